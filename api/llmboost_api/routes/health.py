"""GET /health (the process lives), /ready (it can answer) and / (where to go)."""

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from redis.exceptions import RedisError

from llmboost.jobs import JOB_CLASSES
from llmboost_api.pod import Pod, pod_of

router = APIRouter(tags=["health"])

READY_TIMEOUT_S = 2.0


@router.get("/")
async def hint() -> dict[str, str]:
    """What this is."""
    return {"llmboost": "an OpenAI-compatible API", "base_url": "/v1", "docs": "/docs", "ready": "/ready"}


@router.get("/health")
async def health() -> dict[str, str]:
    """The process lives; says nothing of Redis or workers."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 if Redis can be reached and a worker is alive, else 503 with the reason."""
    pod = pod_of(request)
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            report = await _report(pod)
    except (TimeoutError, RedisError, OSError) as error:
        reason = f"Redis can't be reached ({type(error).__name__})."
        return JSONResponse({"status": "unavailable", "reason": reason}, 503)
    if not report["workers"]:
        return JSONResponse({"status": "unavailable", "reason": "No worker is alive.", **report}, 503)
    return JSONResponse({"status": "ready", **report})


async def _report(pod: Pod) -> dict[str, Any]:
    workers = await pod.registry.workers()
    models = sorted(
        {worker.model for worker in workers} | {card.root for card in await pod.registry.models()}
    )
    return {
        "workers": [msgspec.to_builtins(worker) for worker in workers],
        "queues": {
            model: {job_class: await pod.queue.depth(model, job_class) for job_class in JOB_CLASSES}
            for model in models
        },
    }
