"""POST /v1/responses."""

from fastapi import Request, Response

from llmboost.entries import NO_FOLLOW_UP, FollowUp
from llmboost.jobs import new_id
from llmboost_api import body
from llmboost_api.idempotency import RequestName, name_of
from llmboost_api.middleware import rename_request
from llmboost_api.pod import Pod, pod_of
from llmboost_api.protocol.form import RESPONSES, Form
from llmboost_api.protocol.responses.events import EventFramer
from llmboost_api.protocol.responses.items import Message
from llmboost_api.protocol.responses.object import Progress
from llmboost_api.protocol.responses.request import ResponseRequest
from llmboost_api.protocol.shape import encode_json
from llmboost_api.reply import Reply
from llmboost_api.responses.conversation import history_of
from llmboost_api.responses.log import object_of
from llmboost_api.stored import StoredAnswer
from llmboost_api.submission import Submission, made_before, make_submission, submit


async def create_response(request: Request, asker: str, key: str | None) -> Response:
    """Begins a response, or joins the one that a request with the same idempotency key began, and returns it:
    streamed, whole, or, in the background, as it stands.

    Raises:
        ApiError: the request can't be accepted; says why.
    """
    pod = pod_of(request)
    data = await body.receive(request, pod.settings.max_request_bytes)
    asked = body.check(data, ResponseRequest)
    name = name_of(key, RESPONSES.path, data, asker)
    mine = new_id(RESPONSES.prefix)
    rename_request(request, mine)
    found = await made_before(pod, name, stored=asked.store)
    if found is None:
        found = await _submit(pod, asked, asker, name, mine)
    response_id, form = found
    rename_request(request, response_id)
    response = form.response(response_id)
    if asked.background and not asked.stream:
        joined = response_id != mine
        now = await object_of(pod, response_id, form) if joined else response.at(Progress())
        return Response(encode_json(now), media_type="application/json")
    framer = None
    if asked.stream:
        framer = EventFramer(response, event_ids=pod.settings.event_ids, waits=not asked.background)
    return Reply(pod.generations.follow(response_id, form, again=name is not None), pod.settings, framer)


async def _submit(
    pod: Pod, asked: ResponseRequest, asker: str, name: RequestName | None, mine: str
) -> tuple[str, Form]:
    card = await pod.models.find(asked.model)
    history = await history_of(pod, asked.previous_response_id, asker)
    prompts = asked.prompts_after(history)
    stored = stored_answer_of(asked, asker, history)

    def make(response_id: str) -> Submission:
        return make_submission(
            pod,
            RESPONSES,
            response_id,
            card,
            asked,
            prompts,
            owner=asker,
            needs_audience=not asked.background,
            follow_up=follow_up_of(pod, asked, response_id),
            stored=stored,
        )

    return await submit(pod, make, mine, name)


def follow_up_of(pod: Pod, asked: ResponseRequest, response_id: str) -> FollowUp:
    """What the end of a response entails: it is kept, if stored; and told, if in the background."""
    kept = FollowUp(retention=pod.settings.response_ttl) if asked.store else NO_FOLLOW_UP
    return pod.webhooks.follow_up(response_id, kept) if asked.background else kept


def stored_answer_of(asked: ResponseRequest, owner: str, history: list[Message]) -> StoredAnswer | None:
    """What is kept of a response beside its stream; None if it is not to be stored."""
    kept = asked.messages_to_store
    if kept is None:
        return None
    return StoredAnswer(owner=owner, model=asked.model, metadata=asked.attached, input=kept, history=history)
