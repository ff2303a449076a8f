"""POST and GET /v1/batches, GET /v1/batches/{id}, POST /v1/batches/{id}/cancel."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from llmboost_api import body, openapi
from llmboost_api.auth import Asker
from llmboost_api.batches.creation import create, find
from llmboost_api.batches.record import is_batch_id
from llmboost_api.batches.runner import runner_of
from llmboost_api.errors import NO_RETRY, ApiError
from llmboost_api.idempotency import IdempotencyKey, name_of
from llmboost_api.paging import Paging, invalid_after, page_object, query_of
from llmboost_api.patience import answered
from llmboost_api.pod import pod_of
from llmboost_api.protocol.batches import BatchRequest

router = APIRouter(prefix="/v1", tags=["batches"])

PATH = "/v1/batches"


@router.post("/batches", openapi_extra=openapi.body_of(BatchRequest), responses=openapi.OBJECT)
async def create_batch(request: Request, asker: Asker, key: IdempotencyKey) -> dict[str, Any]:
    """Has every line of a file answered, into another file."""
    pod = pod_of(request)
    data = await body.receive(request, pod.settings.max_request_bytes)
    asked = body.check(data, BatchRequest)
    name = name_of(key, PATH, data, asker)
    runner = runner_of(request)
    batch = await create(pod, runner.store, asked, asker, name)
    runner.wake()
    return batch.to_object()


@router.get("/batches", openapi_extra=openapi.query_of(Paging), responses=openapi.OBJECT)
async def list_batches(request: Request, asker: Asker) -> dict[str, Any]:
    """The key's batches, newest first, page by page."""
    wanted = query_of(request, Paging)
    if wanted.after is not None and not is_batch_id(wanted.after):
        raise invalid_after(wanted.after, "the id of a batch")
    batches, more = await answered(
        partial(runner_of(request).store.page, asker, after=wanted.after, limit=wanted.limit)
    )
    return page_object([batch.to_object() for batch in batches], more=more)


@router.get("/batches/{batch_id}", responses=openapi.OBJECT)
async def retrieve_batch(request: Request, batch_id: str, asker: Asker) -> dict[str, Any]:
    """How far a batch is."""
    return (await find(pod_of(request), runner_of(request).store, batch_id, asker)).to_object()


@router.post("/batches/{batch_id}/cancel", responses=openapi.OBJECT)
async def cancel_batch(request: Request, batch_id: str, asker: Asker) -> dict[str, Any]:
    """Ends a batch early: what is done stays done, and the rest is reported as cancelled."""
    pod, store = pod_of(request), runner_of(request).store
    await find(pod, store, batch_id, asker)
    status = await answered(partial(store.cancel, batch_id))
    if status not in ("cancelling", None):
        raise ApiError(
            409,
            f"The batch {batch_id} can't be cancelled any more: it is {status}.",
            code="batch_ended",
            param="batch_id",
            headers=NO_RETRY,
        )
    return (await find(pod, store, batch_id, asker)).to_object()
