"""Stored chat completions as objects: each is its stream, written down, with the metadata of its record."""

from functools import partial
from typing import Any

import msgspec

from llmboost.entries import Queued, ReadEntry
from llmboost.jobs import derived_id
from llmboost_api.answer import Answer
from llmboost_api.errors import ApiError, quoted
from llmboost_api.paging import Order
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import decode_form
from llmboost_api.stored import StoredAnswer

CHUNK = 100
"""Completions that are read at a time when a list looks for those that match."""


async def completions(
    pod: Pod,
    asker: str,
    *,
    count: int,
    after: str | None,
    order: Order,
    model: str | None,
    metadata: dict[str, str],
) -> list[dict[str, Any]]:
    """Up to `count` of the key's stored completions that are complete and match."""
    found: list[dict[str, Any]] = []
    while len(found) < count:
        ids = await answered(
            partial(pod.stored.ids, asker, after=after, count=CHUNK, descending=order == "desc")
        )
        records = await answered(partial(pod.stored.get_all, ids))
        wanted = {
            each: record
            for each, record in zip(ids, records, strict=True)
            if record is not None
            and model in (None, record.model)
            and metadata.items() <= record.metadata.items()
        }
        logs = await answered(partial(pod.streams.read_each, list(wanted)))
        for (each, record), log in zip(wanted.items(), logs, strict=True):
            if (completion := _completion(each, log, record)) is not None:
                found.append(completion)
        if len(ids) < CHUNK:
            break
        after = ids[-1]
    return found[:count]


async def update(pod: Pod, completion_id: str, asker: str, metadata: dict[str, str]) -> dict[str, Any]:
    """Gives a stored completion other metadata; returns it.

    Raises:
        ApiError: no such completion of this key's is stored (404), or it has not ended well (409).
    """
    record = await _record(pod, completion_id, asker)
    record = msgspec.structs.replace(record, metadata=metadata)
    completion = _completion(completion_id, await answered(lambda: pod.streams.read(completion_id)), record)
    if completion is None:
        raise ApiError(
            409,
            f"The completion {quoted(completion_id)} is not complete: only a complete one can be changed.",
            code="completion_not_complete",
            param="completion_id",
        )
    if not await answered(lambda: pod.stored.replace(completion_id, record)):
        raise _not_stored(completion_id)
    return completion


async def messages(pod: Pod, completion_id: str, asker: str) -> list[dict[str, Any]]:
    """The messages that a stored completion answers, oldest first, with ids.

    Raises:
        ApiError: no such completion of this key's is stored (404).
    """
    record = await _record(pod, completion_id, asker)
    return [
        {"id": derived_id("msg_", completion_id, number), "refusal": None, "content_parts": None, **message}
        for number, message in enumerate(record.input)
    ]


async def _record(pod: Pod, completion_id: str, asker: str) -> StoredAnswer:
    record = await answered(lambda: pod.stored.get(completion_id))
    if record is None or record.owner != asker:
        raise _not_stored(completion_id)
    return record


def _completion(completion_id: str, log: list[ReadEntry], record: StoredAnswer) -> dict[str, Any] | None:
    """None if it runs, has failed, or is gone."""
    if not log or not isinstance(queued := log[0][1], Queued):
        return None
    answer = Answer(decode_form(queued.form), completion_id)
    try:
        answer.take(0, log)
    except ApiError:
        return None
    if not answer.ended:
        return None
    completion: dict[str, Any] = msgspec.json.decode(answer.encode(record.metadata))
    return completion


def _not_stored(completion_id: str) -> ApiError:
    return ApiError(
        404,
        f"There is no stored completion {quoted(completion_id)} here. Only those made with 'store': true are "
        "stored, and only the API key that made one can read it.",
        code="completion_not_found",
        param="completion_id",
    )
