"""A server with OpenAI's protocol that answers as it is told, byte for byte; in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Answer = Callable[["Exchange"], Any]
"""A coroutine function that answers one request."""


@dataclass
class Exchange:
    """One request, and the way to its client."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    writer: asyncio.StreamWriter

    async def head(self, status: int = 200, kind: str = "text/event-stream") -> None:
        await self.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n")

    async def send(self, data: bytes) -> None:
        """A part of the body."""
        await self.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def chunk(self, text: str, finish: str | None = None, **more: Any) -> None:
        choice = {"index": 0, "text": text, "delta": {"content": text}, "finish_reason": finish}
        await self.send(b"data: %b\n\n" % json.dumps({"choices": [choice], **more}).encode())

    async def end(self, usage: tuple[int, int] | None = None, *, done: bool = True) -> None:
        if usage is not None:
            counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
            await self.send(b"data: %b\n\n" % json.dumps({"choices": [], "usage": counts}).encode())
        if done:
            await self.send(b"data: [DONE]\n\n")
        await self.write(b"0\r\n\r\n")

    async def reply(self, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        kind = "application/json"
        await self.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        await self.write(data)

    def cut(self) -> None:
        """Breaks the connection."""
        self.writer.transport.abort()

    async def write(self, data: str | bytes) -> None:
        self.writer.write(data.encode() if isinstance(data, str) else data)
        await self.writer.drain()


def prompt_tokens(body: dict[str, Any]) -> int:
    """Ids count as they are; of text, a word is two tokens, and a template adds seven."""
    if "messages" in body:
        return 7 + 2 * sum(len(message["content"].split()) for message in body["messages"])
    prompt = body["prompt"]
    return len(prompt) if isinstance(prompt, list) else 2 * len(prompt.split())


async def good(exchange: Exchange) -> None:
    """As many tokens as asked for, two in a chunk."""
    tokens = exchange.body["max_tokens"]
    await exchange.head()
    for _ in range((tokens + 1) // 2):
        await exchange.chunk("two words")
    await exchange.chunk("", finish="length")
    await exchange.end((prompt_tokens(exchange.body), tokens))


@dataclass
class ScriptedServer:
    """`with ScriptedServer(answer) as server:`; `url` has its `/v1`."""

    answer: Answer = good
    models: Any = field(default_factory=lambda: {"data": [{"id": "tiny", "max_model_len": 4096}]})
    models_status: int = 200
    requests: list[Exchange] = field(default_factory=list)
    """All but those for the list of models."""
    connections: int = 0
    url: str = ""

    def __enter__(self) -> "ScriptedServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def run() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            self._stop = asyncio.Event()
            started.set()
            await self._stop.wait()
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(run(),))
        self._thread.start()
        started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    @property
    def measured(self) -> list[dict[str, Any]]:
        """Bodies of requests that were no probes of one token."""
        return [each.body for each in self.requests if each.body.get("max_tokens", 0) > 1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                path = head[0].split()[1]
                headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
                body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
                exchange = Exchange(path, headers, body, writer)
                if path.endswith("/models"):
                    await exchange.reply(self.models_status, self.models)
                else:
                    self.requests.append(exchange)
                    await self.answer(exchange)
        writer.close()
