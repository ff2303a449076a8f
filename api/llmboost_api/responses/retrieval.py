"""A response that is asked for again, at whichever pod: as it stands, its events, or its input."""

from functools import partial
from typing import Any

from fastapi import Request, Response

from llmboost_api.errors import ApiError
from llmboost_api.middleware import rename_request
from llmboost_api.patience import answered
from llmboost_api.pod import pod_of
from llmboost_api.protocol.form import RESPONSES
from llmboost_api.protocol.responses.events import EventFramer
from llmboost_api.protocol.responses.items import listed
from llmboost_api.protocol.shape import encode_json
from llmboost_api.reply import Reply
from llmboost_api.responses.log import events_of, object_of
from llmboost_api.responses.reading import EventReading
from llmboost_api.retrieval import find


async def retrieve_response(
    request: Request, response_id: str, asker: str, reading: EventReading
) -> Response:
    """The response object as it stands, without waiting; or its events, until it has ended.

    Raises:
        ApiError: there is no event to go on after (400), there is no such response for this key (404), it is
            not kept any more (410), or Redis can't be asked (503).
    """
    pod = pod_of(request)
    form = await find(pod, RESPONSES, response_id, asker)
    rename_request(request, response_id)
    if not reading.stream:
        body = encode_json(await object_of(pod, response_id, form))
        return Response(body, media_type="application/json")
    after = reading.after
    if after is not None:
        events = await events_of(pod, response_id, form)
        # What a client has had is in the log, so this is sure at once, while the response still runs.
        if after.number >= events.count:
            raise after.refused(
                f"the response has events 0 to {events.count - 1} so far. Give the sequence_number of the "
                "last event received, or leave it out to get all of them."
            )
        if after.number == events.count - 1 and events.progress.terminal is not None:
            return Response(status_code=204)  # It has had everything; this is what ends an EventSource.
    framer = EventFramer(
        form.response(response_id),
        event_ids=pod.settings.event_ids,
        after=-1 if after is None else after.number,
    )
    return Reply(pod.generations.follow(response_id, form, again=True), pod.settings, framer)


async def input_items(request: Request, response_id: str, asker: str) -> list[dict[str, Any]]:
    """What a stored response was asked with (and not the turns before it), oldest first.

    Raises:
        ApiError: there is no such response for this key or it was not stored (404), it is not kept any more
            (410), or Redis can't be asked (503).
    """
    pod = pod_of(request)
    await find(pod, RESPONSES, response_id, asker)
    stored = await answered(partial(pod.stored.get, response_id))
    if stored is None:
        raise ApiError(
            404,
            f"The input of {response_id!r} is not kept, for it was made with 'store': false. "
            "Leave that out to have the next one's kept.",
            code="response_not_stored",
            param="response_id",
        )
    return listed(response_id, stored.input)
