"""One request: its answer streamed, and what happened when."""

import time
from typing import Any

import msgspec

from llmboost.cli.bench.events import Events, message_in, shown
from llmboost.cli.bench.record import Record
from llmboost.cli.bench.wire import Connections, WireError


class Client:
    """Sends requests to one server, any number at a time."""

    def __init__(self, url: str, api_key: str | None, timeout: float) -> None:
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self._connections = Connections(url, headers, timeout)
        self.running = 0
        self.chunks = 0
        """With text, so far, of all requests."""

    def close(self) -> None:
        """Closes its connections."""
        self._connections.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            WireError: there is no answer.
        """
        reply = await self._connections.ask(self._connections.encode("GET", path))
        return reply.status, reply.body

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        """Status and body of an answer that is not streamed.

        Raises:
            WireError: there is no answer.
        """
        reply = await self._connections.ask(self._encode(path, body))
        return reply.status, reply.body

    def _encode(self, path: str, body: dict[str, Any]) -> bytes:
        return self._connections.encode("POST", path, msgspec.json.encode(body))

    async def stream(self, path: str, body: dict[str, Any]) -> Record:
        """Never raises: what goes wrong is in the record."""
        request = self._encode(path, body)
        record, events = Record(), Events()

        def take(data: bytes, now: float) -> None:
            if chunks := events.feed(data):
                record.arrivals.append(now)
                record.chunks.append(chunks)
                self.chunks += chunks

        self.running += 1
        record.sent = time.perf_counter()
        try:
            reply = await self._connections.ask(request, take)
        except WireError as error:
            record.error, record.message = error.kind, str(error)
        else:
            record.status = reply.status
            if reply.status != 200:
                record.error, record.message = f"status {reply.status}", message_in(reply.body)
            elif not reply.content_type.startswith("text/event-stream"):
                record.error = "no stream"
                record.message = f"content type {reply.content_type or '(none)'}: {shown(reply.body)}"
        finally:
            record.ended = time.perf_counter()
            self.running -= 1
        if events.finish():
            record.arrivals.append(record.ended)
            record.chunks.append(1)
        if record.error is None:
            _judge(record, events)
        return record


def _judge(record: Record, events: Events) -> None:
    if events.error is not None:
        record.error, record.message = "error in the stream", events.error
    elif not events.is_complete:
        record.error = "ended early"
        record.message = "the stream ended without [DONE] or a finish_reason"
    if events.usage is not None:
        record.prompt_tokens = events.usage.prompt_tokens
        record.cached_tokens = events.usage.cached_tokens
        record.counted_tokens = events.usage.completion_tokens
