"""A response as its log has it now, without waiting for more."""

from functools import partial
from typing import Any

from llmboost_api import errors
from llmboost_api.generation import GONE
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import Form
from llmboost_api.protocol.responses.events import ResponseEvents
from llmboost_api.protocol.responses.object import Progress


async def progress_of(pod: Pod, response_id: str) -> Progress | None:
    """How far it has come; None if there is nothing of it.

    Raises:
        ApiError: Redis can't be asked (503).
    """
    log = await answered(partial(pod.streams.read, response_id))
    return Progress.of(log) if log else None


async def object_of(pod: Pod, response_id: str, form: Form) -> dict[str, Any]:
    """The response object as it stands.

    Raises:
        ApiError: it has just expired or been deleted (410), or as `progress_of`.
    """
    progress = await progress_of(pod, response_id)
    if progress is None:
        raise errors.from_stream(GONE)
    return form.response(response_id).at(progress)


async def events_of(pod: Pod, response_id: str, form: Form) -> ResponseEvents:
    """All its events so far, counted.

    Raises:
        ApiError: Redis can't be asked (503).
    """
    events = ResponseEvents(form.response(response_id))
    for _, entry in await answered(partial(pod.streams.read, response_id)):
        events.of(entry)
    return events
