"""What a client makes of an API's answers: streams of events, and errors."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec


@dataclass(frozen=True)
class Frame:
    """One event, as raw as can be."""

    id: str | None
    data: str

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.data)


def frames_of(text: str) -> list[Frame]:
    """Refuses anything but `id:` lines, `data:` lines and pings."""
    text = text.replace(": ping\n", "")
    assert text.endswith("\n\n"), text
    frames = []
    for event in text[:-2].split("\n\n"):
        *ids, data = event.split("\n")
        assert data.startswith("data: "), event
        assert len(ids) <= 1, event
        assert all(line.startswith("id: ") for line in ids), event
        frames.append(Frame(ids[0][4:] if ids else None, data[6:]))
    return frames


def events(text: str) -> list[str]:
    """The events of which all has arrived."""
    return [event + "\n\n" for event in text.split("\n\n")[:-1]]


def last_id(received: Sequence[str]) -> str | None:
    """What an EventSource that has received these events sends when it connects again."""
    ids = [line[4:] for event in received for line in event.splitlines() if line.startswith("id: ")]
    return ids[-1] if ids else None


def id_in(text: str) -> str:
    """The id in a stream's first chunk."""
    data = next(line[6:] for line in text.splitlines() if line.startswith("data: "))
    return str(json.loads(data)["id"])


class OpenStream:
    """A stream that is being read, so that its connection is kept."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.text = ""
        self._chunks = response.aiter_text()

    @property
    def events(self) -> list[str]:
        return events(self.text)

    @property
    def id(self) -> str:
        return id_in(self.text)

    async def until(self, count: int) -> "OpenStream":
        """Reads on until so many events have come in all."""
        assert self.response.status_code == 200, await self.response.aread()
        while len(self.events) < count:
            self.text += await anext(self._chunks)
        return self

    async def finish(self) -> str:
        """Reads to the end; all that it brought."""
        async for chunk in self._chunks:
            self.text += chunk
        return self.text


def check_error(
    response: httpx.Response, status: int, code: str | None = None, param: str | None = None
) -> str:
    """OpenAI's shape and our header; returns the message."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["param"]) == (code, param)
    return str(error["message"])
