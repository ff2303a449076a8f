"""POST /v1/completions; and by id: GET, and POST …/cancel."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from llmboost_api import openapi
from llmboost_api.auth import Asker
from llmboost_api.creation import create
from llmboost_api.ending import cancel
from llmboost_api.idempotency import IdempotencyKey
from llmboost_api.pod import pod_of
from llmboost_api.protocol.completions import CompletionRequest
from llmboost_api.protocol.form import COMPLETIONS
from llmboost_api.resume import Reading, beginning, reading
from llmboost_api.retrieval import retrieve

router = APIRouter(prefix="/v1", tags=["completions"])


@router.post(
    "/completions",
    dependencies=[Depends(beginning)],
    openapi_extra=openapi.body_of(CompletionRequest),
    responses=openapi.ANSWERS,
)
async def create_completion(request: Request, asker: Asker, key: IdempotencyKey) -> Response:
    """Continues one prompt or several; choice `i` of prompt `p` is number `p * n + i`."""
    return await create(request, COMPLETIONS, asker, key)


@router.get("/completions/{completion_id}", responses=openapi.ANSWERS_AGAIN)
async def retrieve_completion(
    request: Request, completion_id: str, asker: Asker, wanted: Annotated[Reading, Depends(reading)]
) -> Response:
    """The answer again, or the rest of its stream, while it runs and for a while after."""
    return await retrieve(request, COMPLETIONS, completion_id, asker, wanted)


@router.post("/completions/{completion_id}/cancel", responses=openapi.ERRORS)
async def cancel_completion(request: Request, completion_id: str, asker: Asker) -> dict[str, Any]:
    """Ends the answer at its next token, from any pod; its stream ends in the error `cancelled`."""
    cancelled = await cancel(pod_of(request), COMPLETIONS, completion_id, asker)
    return {"id": completion_id, "object": "text_completion.cancelled", "cancelled": cancelled}
