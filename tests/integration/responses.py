"""Responses as the tests ask for them, and their events, held to the official package's types."""

import asyncio
import json
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel, TypeAdapter

from llmboost.jobs import GenerationJob

from .api_pod import MODEL, RETRY, WORDS, RunningPod, ends, says

RESPONSES = "/v1/responses"
_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)

EVENTS = ["created", "in_progress", "output_item.added", "content_part.added"]
DONE = ["output_text.done", "content_part.done", "output_item.done"]


def ask(**fields: Any) -> dict[str, Any]:
    """A request for a response."""
    return {"model": MODEL, "input": "Tell me a story.", **fields}


def check_response(data: dict[str, Any]) -> Response:
    """The object, if it is all that the official type wants and nothing in it is of another type."""
    return Response.model_validate(data, strict=True)


def check_items(data: dict[str, Any]) -> ResponseItemList:
    return ResponseItemList.model_validate(data, strict=True)


class Paused:
    """A script that says two words and then waits for `go`."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    def __call__(self, job: GenerationJob) -> list[Any]:
        return [*says(WORDS)[:2], self.go.wait(), *says(WORDS)[2:], ends()]


class Event(BaseModel):
    """One event as it came."""

    id: str | None
    type: str
    data: dict[str, Any]

    @property
    def number(self) -> int:
        return int(self.data["sequence_number"])


def events_in(text: str, *, ids: bool = True) -> list[Event]:
    """The events of a stream: each of its official type, numbered, with `id:` and `event:` that agree."""
    text = text.removeprefix(RETRY).replace(": ping\n", "")
    assert text.endswith("\n\n"), text
    found = []
    for frame in text[:-2].split("\n\n"):
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        data = json.loads(fields["data"])
        event = Event(id=fields.get("id"), type=fields["event"], data=data)
        assert data["type"] == event.type
        assert event.id == (str(event.number) if ids else None)
        if event.type == "response.cancelled":  # OpenAI has no type for it.
            check_response(data["response"])
        else:
            _EVENT.validate_python(data, strict=True)
        found.append(event)
    return found


def kinds(events: list[Event]) -> list[str]:
    """What the events are, without the prefix that all have."""
    assert all(event.type.startswith("response.") for event in events)
    return [event.type.removeprefix("response.") for event in events]


def text_of(events: list[Event]) -> str:
    return "".join(event.data["delta"] for event in events if event.type == "response.output_text.delta")


async def stream_of(pod: RunningPod, **fields: Any) -> str:
    """All of a new response's stream."""
    response = await pod.http.post(RESPONSES, json=ask(stream=True, **fields))
    assert response.status_code == 200, response.text
    return response.text


async def rest(pod: RunningPod, response_id: str, after: int | None = None) -> httpx.Response:
    """The events of a response behind one of them."""
    query = {"stream": "true", **({} if after is None else {"starting_after": str(after)})}
    return await pod.http.get(f"{RESPONSES}/{response_id}", params=query)


async def get(pod: RunningPod, response_id: str) -> Response:
    """The response object as it stands."""
    response = await pod.http.get(f"{RESPONSES}/{response_id}")
    assert response.status_code == 200, response.text
    return check_response(response.json())
