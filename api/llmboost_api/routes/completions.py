"""POST /v1/completions, and GET /v1/completions/{id}."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response

from llmboost.jobs import new_id
from llmboost_api import body, openapi
from llmboost_api.auth import owner
from llmboost_api.jobs import make_jobs
from llmboost_api.middleware import rename_request
from llmboost_api.pod import pod_of
from llmboost_api.protocol.completions import CompletionRequest
from llmboost_api.protocol.form import COMPLETIONS, Form
from llmboost_api.protocol.tier import job_class
from llmboost_api.reply import Reply
from llmboost_api.resume import Reading, beginning, reading
from llmboost_api.retrieval import retrieve

router = APIRouter(prefix="/v1")


@router.post(
    "/completions",
    dependencies=[Depends(beginning)],
    openapi_extra=openapi.body_of(CompletionRequest),
    responses=openapi.ANSWERS,
    tags=["completions"],
)
async def create_completion(request: Request, asker: Annotated[str, Depends(owner)]) -> Response:
    """Continues one prompt or several; choice `i` of prompt `p` is number `p * n + i`."""
    pod = pod_of(request)
    asked = await body.read(request, CompletionRequest, pod.settings.max_request_bytes)
    card = await pod.models.find(asked.model)
    completion_id = new_id(COMPLETIONS.prefix)
    rename_request(request, completion_id)
    jobs = make_jobs(
        completion_id,
        card,
        asked.prompts(),
        asked.sampling_params(),
        pod.settings,
        owner=asker,
        echo=asked.echo,
        job_class=job_class(asked.service_tier),
    )
    form = Form.of(asked, COMPLETIONS, jobs, always_usage=pod.settings.always_include_usage)
    await pod.generations.submit(jobs, form)
    return Reply(pod.generations.follow(completion_id, form), pod.settings, stream=asked.stream)


@router.get("/completions/{completion_id}", responses=openapi.ANSWERS_AGAIN, tags=["completions"])
async def retrieve_completion(
    request: Request,
    completion_id: str,
    asker: Annotated[str, Depends(owner)],
    wanted: Annotated[Reading, Depends(reading)],
) -> Response:
    """The answer again, or the rest of its stream, while it runs and for a while after."""
    return await retrieve(request, COMPLETIONS, completion_id, asker, wanted)
