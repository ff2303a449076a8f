"""POST on an endpoint whose completions are generated from its body alone."""

from functools import partial

from fastapi import Request, Response

from llmboost.entries import NO_FOLLOW_UP, FollowUp
from llmboost.jobs import new_id
from llmboost_api import body
from llmboost_api.idempotency import RequestName, name_of
from llmboost_api.middleware import rename_request
from llmboost_api.pod import Pod, pod_of
from llmboost_api.protocol.form import Endpoint, Form
from llmboost_api.protocol.sampling import GenerationRequest
from llmboost_api.reply import Reply
from llmboost_api.sse import Framer
from llmboost_api.stored import StoredAnswer
from llmboost_api.submission import made_before, make_submission, submit


async def create(request: Request, endpoint: Endpoint, asker: str, key: str | None) -> Response:
    """Begins the answer to a request and returns it, streamed or whole; or joins the answer that a request
    with the same idempotency key began.

    Raises:
        ApiError: the request can't be accepted; says why.
    """
    pod = pod_of(request)
    data = await body.receive(request, pod.settings.max_request_bytes)
    asked = body.check(data, endpoint.request)
    name = name_of(key, endpoint.path, data, asker)
    kept = asked.messages_to_store
    stored = None
    if kept is not None:
        stored = StoredAnswer(owner=asker, model=asked.model, metadata=asked.attached, input=kept)
    found = await made_before(pod, name, stored=stored is not None)
    if found is None:
        found = await _submit(request, pod, endpoint, asked, asker, name, stored)
    completion_id, form = found
    rename_request(request, completion_id)
    generation = pod.generations.follow(completion_id, form, again=name is not None)
    framer = Framer(form, completion_id, event_ids=pod.settings.event_ids) if asked.stream else None
    metadata = None if stored is None else stored.metadata
    return Reply(generation, pod.settings, framer, metadata=metadata)


async def _submit(
    request: Request,
    pod: Pod,
    endpoint: Endpoint,
    asked: GenerationRequest,
    asker: str,
    name: RequestName | None,
    stored: StoredAnswer | None,
) -> tuple[str, Form]:
    card = await pod.models.find(asked.model)
    make = partial(
        make_submission,
        pod,
        endpoint,
        card=card,
        asked=asked,
        prompts=asked.prompts(),
        owner=asker,
        follow_up=FollowUp(retention=pod.settings.response_ttl) if stored else NO_FOLLOW_UP,
        stored=stored,
        listed=True,
    )
    completion_id = new_id(endpoint.prefix)
    rename_request(request, completion_id)
    return await submit(pod, make, completion_id, name)
