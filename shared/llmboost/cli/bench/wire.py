"""HTTP/1.1, as thin as it gets: the time of a token is the time at which its bytes were read.

A general client spends 50 to 100 µs on each chunk of a stream, which on the server's own machine is taken
from the server. This one hands the bytes of a body on from where the event loop reads them.
"""

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import SplitResult, urlsplit

import certifi
import httptools

TakeBody = Callable[[bytes, float], None]
"""Called with a part of a body, and with when it was read."""


class WireError(Exception):
    """A request got no answer, or not all of it. `kind`: in a word or two, the same for all of its kind."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Reply:
    """An answer; its body, if it is an error's or nobody takes it."""

    def __init__(self, take: TakeBody | None) -> None:
        self.status = 0
        self.content_type = ""
        self.body = b""
        self.has_begun = False
        self.ends_with_connection = True
        """It has no length of its own."""
        self._take = take

    def header(self, name: bytes, value: bytes) -> None:
        """Notes what matters of it."""
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.decode("latin-1").lower()
        elif name in (b"content-length", b"transfer-encoding"):
            self.ends_with_connection = False

    def add(self, data: bytes, now: float) -> None:
        """A part of the body."""
        if self._take is not None and self.status == 200:
            self._take(data, now)
        else:
            self.body += data


class Connection(asyncio.Protocol):
    """One connection, which serves one request after another."""

    def __init__(self) -> None:
        self.is_open = False
        self.is_stale = False
        """It has served a request before, and nothing came in answer to this one."""
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._reply: Reply | None = None
        self._ended: asyncio.Future[None]
        self._headers_ended = False
        self._was_used = False
        self._now = 0.0

    async def ask(self, request: bytes, take: TakeBody | None = None) -> Reply:
        """Sends a request and waits for all of its answer.

        Raises:
            WireError: it did not come, or not all of it.
        """
        was_used = self._was_used
        self._reply = reply = Reply(take)
        self._ended = asyncio.get_running_loop().create_future()
        self._headers_ended = False
        self._transport.write(request)
        try:
            await self._ended
        except BaseException:
            self.is_stale = was_used and not reply.has_begun
            self.close()
            raise
        finally:
            self._reply = None
            self._was_used = True
        return reply

    def close(self) -> None:
        """At once; what is under way fails."""
        self.is_open = False
        self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(WireError("not HTTP", f"the answer is not HTTP/1.1: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if self._reply is None or self._ended.done():
            return
        if error is None and self._headers_ended and self._reply.ends_with_connection:
            self._ended.set_result(None)
        else:
            where = "in the middle of an answer" if self._reply.has_begun else "before an answer"
            why = f": {error}" if error is not None else ""
            self._ended.set_exception(WireError("connection lost", f"the connection was closed {where}{why}"))

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._reply is not None:
            self._reply.has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reply is not None:
            self._reply.header(name, value)

    def on_headers_complete(self) -> None:
        if self._reply is not None:
            self._reply.status = self._parser.get_status_code()
            self._headers_ended = True

    def on_body(self, data: bytes) -> None:
        if self._reply is not None:
            self._reply.add(data, self._now)

    def on_message_complete(self) -> None:
        if self._reply is None or self._reply.status == 100 or self._ended.done():
            return
        self._ended.set_result(None)
        if not self._parser.should_keep_alive():
            self.is_open = False
            self._transport.close()

    def _fail(self, error: WireError) -> None:
        if self._reply is not None and not self._ended.done():
            self._ended.set_exception(error)


class Connections:
    """Connections to one server, as many as there are requests at a time; each is used again and again."""

    def __init__(self, url: str, headers: dict[str, str], timeout: float) -> None:
        """`timeout`: seconds that a request may take in all."""
        self._url = urlsplit(url)
        self._timeout = timeout
        self._idle: list[Connection] = []
        secure = self._url.scheme == "https"
        self._port = self._url.port or (443 if secure else 80)
        self._tls = _tls() if secure else None
        host = self._url.netloc.rpartition("@")[2]
        fields = {"host": host, "user-agent": "llmboost-bench", "accept": "*/*", **headers}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in fields.items())

    def encode(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole request."""
        kind = f"content-type: application/json\r\ncontent-length: {len(body)}\r\n" if body else ""
        head = f"{method} {self._url.path}{path} HTTP/1.1\r\n{self._headers}{kind}\r\n"
        return head.encode("latin-1") + body

    async def ask(self, request: bytes, take: TakeBody | None = None) -> Reply:
        """Sends it and waits for all of the answer.

        Raises:
            WireError: it did not come, or not all of it.
        """
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    connection = await self._take()
                    try:
                        reply = await connection.ask(request, take)
                    except WireError:
                        # A server may close what lies idle at the moment at which it is used again.
                        if connection.is_stale:
                            continue
                        raise
                    if connection.is_open:
                        self._idle.append(connection)
                    return reply
        except TimeoutError:
            raise WireError(
                "timeout", f"no end of the answer within {self._timeout:g} s (--timeout)"
            ) from None

    def close(self) -> None:
        """Closes what is idle."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return await self._open()

    async def _open(self) -> Connection:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                Connection, self._url.hostname or "", self._port, ssl=self._tls
            )
        except ssl.SSLError as error:
            raise WireError("TLS", f"no secure connection: {error}") from None
        except OSError as error:
            raise WireError("no connection", _explain(self._url, error)) from None
        return connection


def _explain(url: SplitResult, error: OSError) -> str:
    place = url.netloc.rpartition("@")[2]
    if isinstance(error, socket.gaierror):
        return f"there is no host {url.hostname!r}: {error.strerror}"
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return f"nothing listens at {place}"
    return f"can't connect to {place}: {error.strerror or error}"


def _tls() -> ssl.SSLContext:
    # A company's own authority is named as other clients have it named.
    return ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE") or certifi.where())
