"""A pod that knows how it is, and batches that need no model: what others see of a real one, without its
imports."""

from collections.abc import AsyncIterator

import anyio
import uvicorn
from batches import FakeBatches
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from llmboost.readiness import live_workers
from llmboost.settings import ApiSettings


def run(settings: ApiSettings) -> None:
    async def ready(request: Request) -> Response:
        workers = await live_workers(settings.redis_url or "")
        return PlainTextResponse("ready", status_code=200 if workers else 503)

    async def slow(request: Request) -> Response:
        """Ten lines in a second: a stream that is running when the pod is told to stop."""

        async def lines() -> AsyncIterator[str]:
            for number in range(10):
                yield f"{number}\n"
                await anyio.sleep(0.1)

        return StreamingResponse(lines())

    app = Starlette(routes=[Route("/ready", ready), Route("/slow", slow), *FakeBatches(step=1).routes()])
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=int(settings.drain_timeout),
    )
