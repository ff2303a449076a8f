"""Stored chat completions: GET /v1/chat/completions; and by id: POST, DELETE, and GET …/messages."""

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from llmboost.jobs import made_at
from llmboost_api import body, ending, openapi, stored_chat
from llmboost_api.auth import Asker
from llmboost_api.paging import Order, OrderedPaging, invalid_after, page_object, page_of, query_of
from llmboost_api.pod import pod_of
from llmboost_api.protocol.form import CHAT
from llmboost_api.protocol.metadata import Metadata
from llmboost_api.protocol.request import RequestModel

router = APIRouter(prefix="/v1/chat/completions", tags=["chat"], responses=openapi.ERRORS)


class Listing(OrderedPaging):
    """Which of the stored completions are wanted."""

    order: Order = Field("asc", description="By time: oldest or newest first.")
    model: str | None = None
    metadata: dict[str, str] = Field({}, description="All of these pairs: `metadata[key]=value`.")


class MessageListing(OrderedPaging):
    """Which of a completion's messages are wanted."""

    order: Order = Field("asc", description="Oldest or newest first.")


class Update(RequestModel):
    """What can be changed of a stored completion."""

    metadata: Metadata | None = None


@router.get("", openapi_extra=openapi.query_of(Listing))
async def list_chat_completions(request: Request, asker: Asker) -> dict[str, Any]:
    """The stored completions of this API key that are complete."""
    wanted = query_of(request, Listing)
    if wanted.after is not None and not (CHAT.made(wanted.after) and made_at(wanted.after)):
        raise invalid_after(wanted.after, "the id of a chat completion")
    found = await stored_chat.completions(
        pod_of(request),
        asker,
        count=wanted.limit + 1,
        after=wanted.after,
        order=wanted.order,
        model=wanted.model,
        metadata=wanted.metadata,
    )
    return page_object(found[: wanted.limit], more=len(found) > wanted.limit)


@router.post("/{completion_id}", openapi_extra=openapi.body_of(Update))
async def update_chat_completion(request: Request, completion_id: str, asker: Asker) -> dict[str, Any]:
    """Gives a stored completion other metadata."""
    pod = pod_of(request)
    asked = await body.read(request, Update, pod.settings.max_request_bytes)
    return await stored_chat.update(pod, completion_id, asker, asked.metadata or {})


@router.get("/{completion_id}/messages", openapi_extra=openapi.query_of(MessageListing))
async def list_chat_completion_messages(request: Request, completion_id: str, asker: Asker) -> dict[str, Any]:
    """The messages that a stored completion answers."""
    wanted = query_of(request, MessageListing)
    messages = await stored_chat.messages(pod_of(request), completion_id, asker)
    return page_of(messages, wanted, "messages")


@router.delete("/{completion_id}")
async def delete_chat_completion(request: Request, completion_id: str, asker: Asker) -> dict[str, Any]:
    """Forgets a completion; one that still runs is cancelled."""
    await ending.delete(pod_of(request), CHAT, completion_id, asker)
    return {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
