"""POST /v1/completions."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from llmboost.jobs import new_id
from llmboost_api import body, openapi
from llmboost_api.auth import owner
from llmboost_api.jobs import make_jobs
from llmboost_api.middleware import rename_request
from llmboost_api.pod import pod_of
from llmboost_api.protocol.completions import CompletionRequest, CompletionShape
from llmboost_api.reply import Reply

router = APIRouter(prefix="/v1")


@router.post(
    "/completions",
    openapi_extra=openapi.body_of(CompletionRequest),
    responses=openapi.ANSWERS,
    tags=["completions"],
)
async def create_completion(request: Request, asker: Annotated[str, Depends(owner)]) -> Response:
    """Continues one prompt or several; choice `i` of prompt `p` is number `p * n + i`."""
    pod = pod_of(request)
    asked = await body.read(request, CompletionRequest, pod.settings.max_request_bytes)
    card = await pod.models.find(asked.model)
    completion_id = new_id("cmpl")
    rename_request(request, completion_id)
    jobs = make_jobs(
        completion_id,
        card,
        asked.prompts(),
        asked.sampling_params(),
        pod.settings,
        owner=asker,
        echo=asked.echo,
    )
    shape = CompletionShape(
        completion_id,
        int(jobs[0].created),
        asked.model,
        logprobs=asked.logprobs is not None,
        usage_null=asked.include_usage,
    )
    return Reply(pod.generations.of(jobs), shape, asked, pod.settings)
