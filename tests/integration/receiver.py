"""A server that webhooks are sent to: it keeps what comes, and answers as it is told."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import openai
from openai.types.webhooks import UnwrapWebhookEvent

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
_CLIENT = openai.OpenAI(api_key="-", base_url="http://localhost")


@dataclass
class Call:
    """One request."""

    target: str
    headers: Mapping[str, str]
    body: bytes

    def event(self, secret: str = SECRET) -> UnwrapWebhookEvent:
        """What it says, once its signature is found to be right."""
        return _CLIENT.webhooks.unwrap(self.body, dict(self.headers), secret=secret)


@dataclass
class Receiver:
    """Answers with `statuses` one by one, then with 200; `None` is to say nothing and let a caller wait."""

    port: int
    statuses: list[int | None] = field(default_factory=list)
    location: str = ""
    calls: list[Call] = field(default_factory=list)
    taken: list[Call] = field(default_factory=list)
    """Those that were answered with 200."""

    def url(self, path: str = "/hook", host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {
                name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])
            }
            call = Call(head[0].split()[1], headers, await reader.readexactly(int(headers["content-length"])))
            self.calls.append(call)
            status = self.statuses.pop(0) if self.statuses else 200
            if status is None:
                await reader.read()  # until the caller has gone
            else:
                if status == 200:
                    self.taken.append(call)
                location = f"location: {self.location}\r\n" if self.location else ""
                writer.write(f"HTTP/1.1 {status} -\r\n{location}content-length: 2\r\n\r\nOK".encode())
                await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving(
    tls: Callable[[], ssl.SSLContext] | None = None, port: int = 0
) -> AsyncIterator[Receiver]:
    """On any free port, unless one is given."""
    receiver = Receiver(port)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", port, ssl=tls() if tls else None)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
