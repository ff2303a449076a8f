"""A completion that is asked for again, at whichever pod: its answer, or the rest of its stream."""

from datetime import UTC, datetime

from fastapi import Request, Response

from llmboost.frames import Cursor
from llmboost.jobs import made_at
from llmboost.settings import ApiSettings
from llmboost.streams import BEGINNING, SEAL_ID
from llmboost_api.errors import ApiError, quoted
from llmboost_api.middleware import rename_request
from llmboost_api.patience import answered
from llmboost_api.pod import Pod, pod_of
from llmboost_api.protocol.form import ENDPOINTS, Endpoint, Form, decode_form
from llmboost_api.reply import Reply
from llmboost_api.resume import Reading, ResumePoint
from llmboost_api.sse import Framer


async def retrieve(
    request: Request, endpoint: Endpoint, completion_id: str, asker: str, reading: Reading
) -> Response:
    """What `reading` wants of one of the endpoint's completions; waits for what is not there yet.

    Raises:
        ApiError: the stream can't go on from there (400), there is no such completion for this key (404), it
            is not kept any more (410), or Redis can't be asked (503).
    """
    pod = pod_of(request)
    form = await find(pod, endpoint, completion_id, asker, reading.after)
    rename_request(request, completion_id)
    if reading.after is not None and reading.after.cursor == Cursor(SEAL_ID):
        return Response(status_code=204)  # It has had everything; this is what ends an EventSource.
    generation = pod.generations.follow(completion_id, form, again=True)
    if not reading.stream:
        record = await answered(lambda: pod.stored.get(completion_id))
        return Reply(generation, pod.settings, metadata=None if record is None else record.metadata)
    framer = Framer(form, completion_id, event_ids=pod.settings.event_ids, after=reading.after)
    return Reply(generation, pod.settings, framer)


async def find(
    pod: Pod, endpoint: Endpoint, completion_id: str, asker: str, after: ResumePoint | None = None
) -> Form:
    """How one of the endpoint's completions is written down.

    Raises:
        ApiError: as `retrieve`.
    """
    made = made_at(completion_id)
    if made is None or not endpoint.made(completion_id):
        raise _unknown(completion_id, endpoint)
    entry_id = BEGINNING if after is None else after.cursor.entry_id
    queued, found = await answered(lambda: pod.streams.find(completion_id, entry_id))
    if queued is None:
        if await answered(lambda: pod.stored.was_deleted(completion_id)):
            raise _unknown(completion_id, endpoint)
        raise _expired(completion_id, made, endpoint, pod.settings)
    if queued.owner != asker:
        raise _unknown(completion_id, endpoint)
    form = decode_form(queued.form)
    if after is None:
        return form
    if form.jobs > 1:
        raise after.refused(
            f"this completion answers {form.jobs} prompts, and its frames carry no ids. "
            "Leave it out to get the stream from its beginning."
        )
    if not found:
        raise after.not_found()
    return form


def _unknown(completion_id: str, endpoint: Endpoint) -> ApiError:
    """Also if it is another key's: whether there is one is nobody else's business."""
    remedy = "Check the id; only the API key that made it can read it."
    for other in ENDPOINTS:
        if other is not endpoint and other.made(completion_id):
            remedy = f"Ids that begin with '{other.stem}' are read at GET {other.path}/{{id}}."
    return ApiError(
        404,
        f"There is no {endpoint.noun} {quoted(completion_id)} here. {remedy}",
        code=f"{endpoint.noun}_not_found",
        param=f"{endpoint.noun}_id",
    )


def _expired(completion_id: str, made: float, endpoint: Endpoint, settings: ApiSettings) -> ApiError:
    when = datetime.fromtimestamp(made, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return ApiError(
        410,
        f"The {endpoint.noun} {completion_id!r} of {when} is not kept any more: an answer stays for "
        f"{settings.retention:.12g} s after its end, a stored one for {settings.response_ttl:.12g} s, "
        "unless it is lost with its server. Send the request again.",
        code=f"{endpoint.noun}_expired",
        param=f"{endpoint.noun}_id",
    )
