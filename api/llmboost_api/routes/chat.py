"""POST /v1/chat/completions."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from llmboost.jobs import new_id
from llmboost_api import body, openapi
from llmboost_api.auth import owner
from llmboost_api.jobs import make_jobs
from llmboost_api.middleware import rename_request
from llmboost_api.pod import pod_of
from llmboost_api.protocol.chat import ChatRequest, ChatShape
from llmboost_api.reply import Reply

router = APIRouter(prefix="/v1")


@router.post(
    "/chat/completions", openapi_extra=openapi.body_of(ChatRequest), responses=openapi.ANSWERS, tags=["chat"]
)
async def create_chat_completion(request: Request, asker: Annotated[str, Depends(owner)]) -> Response:
    """Answers a conversation."""
    pod = pod_of(request)
    asked = await body.read(request, ChatRequest, pod.settings.max_request_bytes)
    card = await pod.models.find(asked.model)
    completion_id = new_id("chatcmpl")
    rename_request(request, completion_id)
    jobs = make_jobs(
        completion_id, card, [asked.prompt()], asked.sampling_params(), pod.settings, owner=asker
    )
    shape = ChatShape(
        completion_id,
        int(jobs[0].created),
        asked.model,
        logprobs=asked.logprobs,
        usage_null=asked.include_usage,
    )
    return Reply(pod.generations.of(jobs), shape, asked, pod.settings)
