"""POST and GET /v1/batches, GET /v1/batches/{id}, POST /v1/batches/{id}/cancel."""

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from llmboost.jobs import new_id, now
from llmboost_api import body, openapi
from llmboost_api.auth import owner
from llmboost_api.batches.record import ID_PREFIX, Batch, BatchRecord, is_batch_id
from llmboost_api.batches.store import CreatedBefore
from llmboost_api.directory import answered
from llmboost_api.errors import NO_RETRY, ApiError, unavailable
from llmboost_api.idempotency import RequestName, idempotency_key, name_of
from llmboost_api.paging import Paging, invalid_after, page_object, query_of
from llmboost_api.pod import Pod, pod_of
from llmboost_api.protocol.batches import BatchRequest, window_seconds
from llmboost_api.protocol.files import MONTH_S
from llmboost_api.resume import shown

router = APIRouter(prefix="/v1", tags=["batches"])

Asker = Annotated[str, Depends(owner)]
PATH = "/v1/batches"


@router.post("/batches", openapi_extra=openapi.body_of(BatchRequest), responses=openapi.OBJECT)
async def create_batch(
    request: Request, asker: Asker, key: Annotated[str | None, Depends(idempotency_key)]
) -> dict[str, Any]:
    """Has every line of a file answered, into another file."""
    pod = pod_of(request)
    data = await body.receive(request, pod.settings.max_request_bytes)
    asked = body.check(data, BatchRequest)
    name = name_of(key, PATH, data, asker)
    batch = await _made_before(pod, name) or await _make(pod, asked, asker, name)
    request.app.state.batch_runner.wake()
    return batch.to_object()


@router.get("/batches", openapi_extra=openapi.query_of(Paging), responses=openapi.OBJECT)
async def list_batches(request: Request, asker: Asker) -> dict[str, Any]:
    """The key's batches, newest first, page by page."""
    wanted = query_of(request, Paging)
    if wanted.after is not None and not is_batch_id(wanted.after):
        raise invalid_after(wanted.after, "the id of a batch")
    batches, more = await answered(
        partial(pod_of(request).batches.page, asker, after=wanted.after, limit=wanted.limit)
    )
    return page_object([batch.to_object() for batch in batches], more=more)


@router.get("/batches/{batch_id}", responses=openapi.OBJECT)
async def retrieve_batch(request: Request, batch_id: str, asker: Asker) -> dict[str, Any]:
    """How far a batch is."""
    return (await _find(pod_of(request), batch_id, asker)).to_object()


@router.post("/batches/{batch_id}/cancel", responses=openapi.OBJECT)
async def cancel_batch(request: Request, batch_id: str, asker: Asker) -> dict[str, Any]:
    """Ends a batch early: what is done stays done, and the rest is reported as cancelled."""
    pod = pod_of(request)
    await _find(pod, batch_id, asker)
    status = await answered(partial(pod.batches.cancel, batch_id))
    if status not in ("cancelling", None):
        raise ApiError(
            409,
            f"The batch {batch_id} can't be cancelled any more: it is {status}.",
            code="batch_ended",
            param="batch_id",
            headers=NO_RETRY,
        )
    return (await _find(pod, batch_id, asker)).to_object()


async def _find(pod: Pod, batch_id: str, asker: str) -> Batch:
    """Raises `ApiError` (404) if this key has no such batch."""
    batch = await answered(partial(pod.batches.get, batch_id)) if is_batch_id(batch_id) else None
    if batch is None or batch.record.owner != asker:
        raise ApiError(
            404,
            f"There is no batch {shown(batch_id)} here. Check the id: a batch is kept for "
            f"{pod.settings.response_ttl:g} s after its end, and only the API key that made it can see it.",
            code="batch_not_found",
            param="batch_id",
        )
    return batch


async def _made_before(pod: Pod, name: RequestName | None) -> Batch | None:
    """The batch that a request of the same name has made."""
    if name is None:
        return None
    taken = await answered(partial(pod.batches.created_before, name.once("")))
    return None if taken is None else await _named(pod, name, taken)


async def _make(pod: Pod, asked: BatchRequest, asker: str, name: RequestName | None) -> Batch:
    await _check_input(pod, asked.input_file_id, asker)
    created = now()
    record = BatchRecord(
        id=new_id(ID_PREFIX),
        owner=asker,
        input_file_id=asked.input_file_id,
        endpoint=asked.endpoint,
        completion_window=asked.completion_window,
        created=created,
        deadline=created + window_seconds(asked.completion_window),
        metadata=asked.metadata,
        output_life=asked.output_expires_after.seconds if asked.output_expires_after else MONTH_S,
    )
    once = None if name is None else name.once(record.id)
    try:
        await answered(partial(pod.batches.create, record, once))
    except CreatedBefore as before:
        assert name is not None
        return await _named(pod, name, before.value)
    return await _find(pod, record.id, asker)


async def _named(pod: Pod, name: RequestName, taken: bytes) -> Batch:
    batch = await answered(partial(pod.batches.get, name.completion_of(taken)))
    if batch is None:
        raise unavailable("The batch of this request expired a moment ago. Try again.")
    return batch


async def _check_input(pod: Pod, file_id: str, asker: str) -> None:
    file = await pod.files.get(asker, file_id)
    if file is None:
        raise ApiError(
            400,
            f"There is no file {shown(file_id)} here. Upload the input with purpose 'batch' first; "
            "only the API key that uploaded it can use it.",
            code="file_not_found",
            param="input_file_id",
        )
    if file.purpose != "batch":
        raise ApiError(
            400,
            f"The file {file_id} has the purpose '{file.purpose}'. Upload it again with purpose 'batch'.",
            code="invalid_purpose",
            param="input_file_id",
        )
