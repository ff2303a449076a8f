"""Conversations: the turns before a response, by the id of the last one.

Each stored response keeps all the turns before it, so a conversation goes on though its beginning has expired
or was deleted. What it keeps is bounded by the context that it had to fit into.
"""

from functools import partial

from llmboost.jobs import is_id
from llmboost.streams import BEGINNING
from llmboost_api.errors import ApiError, quoted
from llmboost_api.patience import answered
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import RESPONSES
from llmboost_api.protocol.responses.items import Message
from llmboost_api.protocol.responses.object import Progress
from llmboost_api.responses.log import progress_of

PARAM = "previous_response_id"


async def history_of(pod: Pod, previous_id: str | None, asker: str) -> list[Message]:
    """All that was said before the response that follows this one: its own history, input and answer.

    One that was cancelled, or ran out of tokens, has said what it has said.

    Raises:
        ApiError: there is no such response for this key, it was not stored, still runs or failed (400); or
            Redis can't be asked (503).
    """
    if previous_id is None:
        return []
    if not is_id(previous_id, RESPONSES.prefix):
        raise _not_found(previous_id, unstored=False)
    stored = await answered(partial(pod.stored.get, previous_id))
    if stored is None or stored.owner != asker:
        raise _not_found(previous_id, stored is None and await _is_there(pod, previous_id, asker))
    progress = await progress_of(pod, previous_id)
    if progress is None:
        raise _not_found(previous_id, unstored=False)
    return [*stored.history, *stored.input, *_answer(previous_id, progress)]


def _answer(previous_id: str, progress: Progress) -> list[Message]:
    status = progress.status
    if status in ("queued", "in_progress"):
        raise ApiError(
            400,
            f"The response {quoted(previous_id)} is still {status}: wait for its end, or cancel it first.",
            code="previous_response_not_finished",
            param=PARAM,
        )
    if status == "failed":
        raise ApiError(
            400,
            f"The response {quoted(previous_id)} failed, so nothing can follow it. Ask again what it was "
            f"asked, with the '{PARAM}' that it had.",
            code="previous_response_failed",
            param=PARAM,
        )
    return [{"role": "assistant", "content": [progress.choice.text]}] if progress.begun else []


async def _is_there(pod: Pod, previous_id: str, asker: str) -> bool:
    """Whether this key has such a response, which then was not stored."""
    queued, _ = await answered(partial(pod.streams.find, previous_id, BEGINNING))
    return queued is not None and queued.owner == asker


def _not_found(previous_id: str, unstored: bool) -> ApiError:
    if unstored:
        why = "was not stored (it was made with 'store': false), so nothing can follow it"
    else:
        why = "was not found: it never was, has expired, was deleted, or another API key made it"
    return ApiError(
        400,
        f"Previous response with id {quoted(previous_id)} {why}. Send the whole conversation as 'input'.",
        code="previous_response_not_found",
        param=PARAM,
    )
