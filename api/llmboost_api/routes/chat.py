"""POST /v1/chat/completions; and by id: GET, and POST …/cancel. Stored ones have routes of their own, too."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from llmboost_api import openapi
from llmboost_api.auth import Asker
from llmboost_api.creation import create
from llmboost_api.ending import cancel
from llmboost_api.idempotency import IdempotencyKey
from llmboost_api.pod import pod_of
from llmboost_api.protocol.chat import ChatRequest
from llmboost_api.protocol.form import CHAT
from llmboost_api.resume import Reading, beginning, reading
from llmboost_api.retrieval import retrieve

router = APIRouter(prefix="/v1", tags=["chat"])


@router.post(
    "/chat/completions",
    dependencies=[Depends(beginning)],
    openapi_extra=openapi.body_of(ChatRequest),
    responses=openapi.ANSWERS,
)
async def create_chat_completion(request: Request, asker: Asker, key: IdempotencyKey) -> Response:
    """Answers a conversation."""
    return await create(request, CHAT, asker, key)


@router.get("/chat/completions/{completion_id}", responses=openapi.ANSWERS_AGAIN)
async def retrieve_chat_completion(
    request: Request, completion_id: str, asker: Asker, wanted: Annotated[Reading, Depends(reading)]
) -> Response:
    """The answer again, or the rest of its stream: while it runs and for a while after (stored: longer)."""
    return await retrieve(request, CHAT, completion_id, asker, wanted)


@router.post("/chat/completions/{completion_id}/cancel", responses=openapi.ERRORS)
async def cancel_chat_completion(request: Request, completion_id: str, asker: Asker) -> dict[str, Any]:
    """Ends the answer at its next token, from any pod; its stream ends in the error `cancelled`."""
    cancelled = await cancel(pod_of(request), CHAT, completion_id, asker)
    return {"id": completion_id, "object": "chat.completion.cancelled", "cancelled": cancelled}
