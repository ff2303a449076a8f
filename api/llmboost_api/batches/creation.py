"""A batch that a client asks for: made once, of a file that is there."""

from functools import partial

from llmboost.jobs import new_id, now
from llmboost.queue import SubmittedBefore
from llmboost_api.batches.record import ID_PREFIX, Batch, BatchRecord, is_batch_id
from llmboost_api.batches.store import BatchStore
from llmboost_api.errors import ApiError, quoted, unavailable
from llmboost_api.idempotency import RequestName
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol.batches import BatchRequest, window_seconds
from llmboost_api.protocol.files import MONTH_S


async def create(
    pod: Pod, store: BatchStore, asked: BatchRequest, asker: str, name: RequestName | None
) -> Batch:
    """The batch that a request asks for, or the one that a request of the same name has made.

    Raises:
        ApiError: there is no such input (400), the name is another request's (409), or Redis can't be asked
            (503).
    """
    return await _made_before(store, name) or await _make(pod, store, asked, asker, name)


async def find(pod: Pod, store: BatchStore, batch_id: str, asker: str) -> Batch:
    """One of the key's batches.

    Raises:
        ApiError: it has no such batch (404), or Redis can't be asked (503).
    """
    batch = await answered(partial(store.get, batch_id)) if is_batch_id(batch_id) else None
    if batch is None or batch.record.owner != asker:
        raise ApiError(
            404,
            f"There is no batch {quoted(batch_id)} here. Check the id: a batch is kept for "
            f"{pod.settings.response_ttl:.12g} s after its end, "
            "and only the API key that made it can see it.",
            code="batch_not_found",
            param="batch_id",
        )
    return batch


async def _made_before(store: BatchStore, name: RequestName | None) -> Batch | None:
    """The batch that a request of the same name has made."""
    if name is None:
        return None
    taken = await answered(partial(store.created_before, name.once("")))
    return None if taken is None else await _named(store, name, taken)


async def _make(
    pod: Pod, store: BatchStore, asked: BatchRequest, asker: str, name: RequestName | None
) -> Batch:
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
        await answered(partial(store.create, record, once))
    except SubmittedBefore as before:
        assert name is not None
        return await _named(store, name, before.value)
    return await find(pod, store, record.id, asker)


async def _named(store: BatchStore, name: RequestName, taken: bytes) -> Batch:
    batch = await answered(partial(store.get, name.completion_of(taken)))
    if batch is None:
        raise unavailable("The batch of this request expired a moment ago. Try again.")
    return batch


async def _check_input(pod: Pod, file_id: str, asker: str) -> None:
    file = await pod.files.get(asker, file_id)
    if file is None:
        raise ApiError(
            400,
            f"There is no file {quoted(file_id)} here. Upload the input with purpose 'batch' first; "
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
