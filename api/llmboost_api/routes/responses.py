"""POST /v1/responses; and by id: GET, DELETE, POST …/cancel, GET …/input_items."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field

from llmboost_api import ending, openapi
from llmboost_api.auth import Asker
from llmboost_api.idempotency import IdempotencyKey
from llmboost_api.paging import OrderedPaging, page_of, query_of
from llmboost_api.pod import pod_of
from llmboost_api.protocol.form import RESPONSES
from llmboost_api.protocol.responses.request import Includable, ResponseRequest
from llmboost_api.responses.creation import create_response
from llmboost_api.responses.log import object_of
from llmboost_api.responses.reading import EventReading, event_reading
from llmboost_api.responses.retrieval import input_items, retrieve_response
from llmboost_api.resume import beginning
from llmboost_api.retrieval import find

router = APIRouter(prefix="/v1", tags=["responses"])


class ItemsListing(OrderedPaging):
    """Which of a response's input items are wanted."""

    include: list[Includable] = Field([], description="Adds nothing: items have what there is of them.")


@router.post(
    "/responses",
    dependencies=[Depends(beginning)],
    openapi_extra=openapi.body_of(ResponseRequest),
    responses=openapi.ANSWERS,
)
async def create(request: Request, asker: Asker, key: IdempotencyKey) -> Response:
    """Answers what is said, in a conversation if it follows another response."""
    return await create_response(request, asker, key)


@router.get("/responses/{response_id}", responses=openapi.ANSWERS_AGAIN)
async def retrieve(
    request: Request, response_id: str, asker: Asker, wanted: Annotated[EventReading, Depends(event_reading)]
) -> Response:
    """The response as it stands, whatever its state; or its events, to its end."""
    return await retrieve_response(request, response_id, asker, wanted)


@router.post("/responses/{response_id}/cancel", responses=openapi.ERRORS)
async def cancel(request: Request, response_id: str, asker: Asker) -> dict[str, Any]:
    """Ends the response at its next token, from any pod, and returns it; one that has ended as it is."""
    pod = pod_of(request)
    form = await find(pod, RESPONSES, response_id, asker)
    await ending.end(pod, response_id, form)
    return await object_of(pod, response_id, form)


@router.delete("/responses/{response_id}", responses=openapi.ERRORS)
async def delete(request: Request, response_id: str, asker: Asker) -> dict[str, Any]:
    """Forgets the response; one that still runs is cancelled. What has followed it stays."""
    await ending.delete(pod_of(request), RESPONSES, response_id, asker)
    return {"id": response_id, "object": "response", "deleted": True}


@router.get(
    "/responses/{response_id}/input_items",
    openapi_extra=openapi.query_of(ItemsListing),
    responses=openapi.ERRORS,
)
async def list_input_items(request: Request, response_id: str, asker: Asker) -> dict[str, Any]:
    """What a stored response was asked with, page by page."""
    wanted = query_of(request, ItemsListing)
    return page_of(await input_items(request, response_id, asker), wanted, "input items")
