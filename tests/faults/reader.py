"""One client's stream and all that it saw, over as many connections as it took."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import httpx
from openai import APIError, AsyncOpenAI, DefaultAsyncHttpxClient

from llmboost.frames import Cursor
from llmboost.streams import position
from tests.e2e.asking import create, path_of

RETRY_S = 0.05
"""Between two tries to reach a pod."""
RETRIES = 10
"""Of OpenAI's client, until a request is accepted: few are too few where Redis is slow and cores are rare."""
PATIENCE_S = 60.0
"""For which a pod is looked for that goes on with the stream."""


class Violation(AssertionError):
    """The stream broke its protocol; says how."""


@dataclass
class ChoiceSeen:
    """One choice, as its chunks had it."""

    text: str = ""
    tokens: list[str] = field(default_factory=list)
    """Of the logprobs, if there were any."""
    offsets: list[int] = field(default_factory=list)
    """Of a plain completion's logprobs."""
    finish_reason: str | None = None
    begun: bool = False

    def take(self, choice: dict[str, Any]) -> None:
        if self.finish_reason is not None:
            raise Violation(f"more after the finish reason: {choice}")
        logprobs = choice.get("logprobs") or {}
        if "delta" in choice:
            if "role" in choice["delta"] and self.begun:
                raise Violation(f"a second beginning: {choice}")
            self.text += choice["delta"].get("content") or ""
            self.tokens += [each["token"] for each in logprobs.get("content") or ()]
        else:
            self.text += choice["text"]
            self.tokens += logprobs.get("tokens", ())
            self.offsets += logprobs.get("text_offset", ())
        self.begun = True
        self.finish_reason = choice["finish_reason"]


class Reader:
    """Asks for a stream and reads it to its end; if the connection breaks, or the pod that serves it is
    going, it goes on from another pod with what it has not read."""

    def __init__(self, body: dict[str, Any], urls: Callable[[], list[str]], first: int = 0) -> None:
        """`urls`: of the pods to ask at the moment; the one numbered `first` comes first."""
        self.body = {**body, "stream": True}
        self.id = ""
        self.choices: dict[int, ChoiceSeen] = {}
        self.usage: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        """Of the frame, or the response, that ended it."""
        self.done = False
        self.cursor = ""
        """Id of the newest frame that had one."""
        self.arrivals: list[float] = []
        """Monotonic times of the chunks with text."""
        self.resumed = 0
        self.posts = 0
        """More than one if a pod was lost before it had said anything."""
        self.moved = 0
        """Times that a pod which was going sent it elsewhere."""
        self.url = ""
        """Of the pod that it reads from, or did last."""
        self.trail: list[str] = []
        """What became of each connection, and when (UTC)."""
        self._urls = urls
        self._turn = first
        self._place: tuple[float, ...] = ()

    @classmethod
    def of(cls, other: "Reader", urls: Callable[[], list[str]], first: int) -> "Reader":
        """One more reader of the same stream, from its beginning."""
        reader = cls(other.body, urls, first)
        reader.id = other.id
        return reader

    @property
    def path(self) -> str:
        return path_of(self.body)

    @property
    def begun(self) -> int:
        """Chunks with text so far."""
        return len(self.arrivals)

    @property
    def ended(self) -> bool:
        return self.done or self.error is not None

    def worst_gap(self, since: float = 0.0) -> float:
        """Between two chunks with text of which the second came after that moment, in seconds."""
        pairs = pairwise(self.arrivals)
        return max((after - before for before, after in pairs if after > since), default=0.0)

    async def read(self, http: httpx.AsyncClient) -> "Reader":
        """Reads to the end, whatever it is."""
        lost_at = None
        while not self.ended:
            urls = self._urls()
            try:
                if urls:
                    await self._connect(http, urls[self._turn % len(urls)])
                    lost_at = None
            except httpx.TransportError as error:
                self._note(type(error).__name__)
            if not self.ended:
                self._turn += 1
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > PATIENCE_S:
                    raise Violation(f"{self.id or 'a request'}: no pod goes on with it")
                await asyncio.sleep(RETRY_S)  # as a client does
        return self

    def _note(self, what: str) -> None:
        self.trail.append(f"{datetime.now(UTC):%H:%M:%S.%f} {what}")

    async def _connect(self, http: httpx.AsyncClient, url: str) -> None:
        if not self.id:
            self.posts += 1
            request = http.stream("POST", f"{url}{self.path}", json=self.body)
        else:
            self.resumed += 1
            headers = {"last-event-id": self.cursor} if self.cursor else {}
            request = http.stream("GET", f"{url}{self.path}/{self.id}?stream=true", headers=headers)
        self._note(f"{'GET' if self.id else 'POST'} {url}")
        async with request as response:
            if response.status_code != 200:
                await response.aread()
                self._refused(response)
                return
            self._note("200")
            self.id, self.url = self.id or response.headers["x-request-id"], url
            moved = self.moved
            async for event_id, data in events(response):
                if self.ended or self.moved > moved:
                    raise Violation(f"more after the end: {data}")
                self._take(event_id, data)
            self._note("end")
        if not self.ended and self.moved == moved:
            raise Violation(f"{self.id} ended without a word")

    def _refused(self, response: httpx.Response) -> None:
        self._note(f"{response.status_code}")
        if response.status_code == 503:
            return  # Redis is away, or the pod is going: later, or elsewhere
        try:
            self.error = response.json()["error"]
        except (ValueError, KeyError):
            raise Violation(f"{response.status_code} {response.text!r}") from None

    def _take(self, event_id: str, data: str) -> None:
        if event_id:
            self._move(event_id)
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        if "error" in chunk and chunk["error"]["code"] == "server_shutdown":
            self.moved += 1
        elif "error" in chunk:
            self.error = chunk["error"]
        else:
            self._take_chunk(chunk)

    def _take_chunk(self, chunk: dict[str, Any]) -> None:
        if self.id not in ("", chunk["id"]):
            raise Violation(f"{self.id} has become {chunk['id']}")
        self.id = chunk["id"]
        for choice in chunk["choices"]:
            self.choices.setdefault(choice["index"], ChoiceSeen()).take(choice)
            if choice.get("text") or choice.get("delta", {}).get("content"):
                self.arrivals.append(time.monotonic())
        if not chunk["choices"]:
            if self.usage is not None:
                raise Violation(f"a second usage: {chunk}")
            self.usage = chunk["usage"]

    def _move(self, event_id: str) -> None:
        cursor = Cursor.parse(event_id)
        if cursor is None:
            raise Violation(f"{self.id}: {event_id!r} is no frame's id")
        # A part of an entry's frames comes before all of them.
        place = (*position(cursor.entry_id), math.inf if cursor.frames is None else cursor.frames)
        if place <= self._place:
            raise Violation(f"{self.id}: frame {event_id} comes after {self.cursor}")
        self.cursor, self._place = event_id, place


class OfficialReader(Reader):
    """The same by OpenAI's own client. It sends a request that fails again, but a stream that has begun and
    breaks off is lost to it."""

    async def read(self, http: httpx.AsyncClient) -> Reader:
        urls = self._urls()
        self.url = urls[self._turn % len(urls)]
        self.posts += 1
        try:
            # Without certificates, which take long to load and which nobody here has.
            plain = DefaultAsyncHttpxClient(verify=False, timeout=None)
            patient = AsyncOpenAI(
                base_url=f"{self.url}/v1", api_key="-", http_client=plain, max_retries=RETRIES
            )
            async with patient as client:
                async for chunk in await create(client, self.body):
                    self._take_chunk(chunk.to_dict())
        except APIError as error:
            self.error = {"code": error.code, "message": error.message}
        # It ends in silence with and without [DONE].
        self.done = self.error is None and all(choice.finish_reason for choice in self.choices.values())
        return self


async def events(response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """(id, data) of each event of a stream, as the standard has it; comments are passed over."""
    event_id, data = "", []
    rest = b""
    async for piece in response.aiter_raw():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b":"):
                continue
            name, _, value = line.partition(b": ")
            if name == b"data":
                data.append(value.decode())
            elif name == b"id":
                event_id = value.decode()
            elif line and name != b"retry":
                raise Violation(f"no such line in an event stream: {line!r}")
            elif data:
                yield event_id, "\n".join(data)
                event_id, data = "", []
