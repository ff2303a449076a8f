"""A client's connection: what it may hold of the server's memory, and for how long.

uvicorn waits without end for a request that never comes whole, and for a client that takes nothing of its
answer: once the kernel's buffer is full, not even closing the connection ends it.
"""

import asyncio
import logging
import socket
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmboost_api.errors import ApiError

logger = logging.getLogger(__name__)

UNSENT_BYTES = 128 * 1024
"""What the kernel takes for a client whose receive window is full; by default it takes megabytes, which are
the pod's memory too. What is on its way to a client that reads is not limited by this."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a request, beyond which it is refused; one read may overshoot. As much as h11 takes."""

BODY_RATE = 16 * 1024
"""Bytes a second. A body that comes slower than that is not waited for; a large one that comes faster may
take as long as it takes."""


def limit_writes(listener: socket.socket, send_timeout: float) -> None:
    """Bounds what accepted connections hold for a client that reads nothing, and lets the kernel end them
    once it has read nothing for so many seconds. An accepted socket inherits its listener's options.

    The kernel, because it alone sees what its own buffer still holds when the answer is written and the
    response over. TCP_USER_TIMEOUT is Linux's: elsewhere the stream ends in time, but its connection stays.
    """
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # It counts while data waits for an acknowledgement or for the peer's window to open.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(send_timeout * 1000)))


class ClientConnection(HttpToolsProtocol):
    """Differs from uvicorn's protocol in this:

    1. A request has `receive_timeout` seconds to arrive, its head and its body, and so long again whenever
       its body has come at `BODY_RATE` meanwhile, or the app has not taken what came; and so long may a new
       connection wait for its first. uvicorn has a limit for neither, only for the pause after a response.
    2. So has its head a limit in bytes.
    3. A client that the kernel gave up is logged.
    """

    def __init__(self, *args: Any, receive_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._late: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = None
        """Of a head that has not come whole; roughly, for they are counted per read."""
        self._body_bytes = 0
        """Of a body, since the time limit was set."""
        self._held_up = False
        """Whether the client was made to wait since then."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        # Not in on_message_begin: line breaks before a request end the pause after a response but begin none.
        if self._late is None:
            self._expect_request()
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._end(None if self._answering else _HEAD_TOO_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head_bytes = None

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._body_bytes += len(body)
        self._held_up |= self.flow.read_paused

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_expecting()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_expecting()
        if isinstance(exc, TimeoutError):
            logger.info("client stopped reading: %s", self._name)

    def end_if_stalled(self) -> None:
        """Breaks the connection if its client takes nothing of what waits: nor would it take an end."""
        if self.flow.write_paused:
            self.transport.abort()

    def _expect_request(self) -> None:
        self._body_bytes, self._held_up = 0, False
        self._late = self.loop.call_later(self._receive_timeout, self._on_late)

    def _stop_expecting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _on_late(self) -> None:
        self._late = None
        if self._answering and not self.cycle.more_body:
            self._expect_request()  # What came is the beginning of the next request, which can wait.
            return
        if self._held_up or self.flow.read_paused or self._body_bytes >= BODY_RATE * self._receive_timeout:
            self._expect_request()
            return
        logger.info("client stopped sending: %s", self._name)
        unanswered = self._answering and not self.cycle.response_started
        self._end(_late_error(self._receive_timeout) if unanswered else None)

    def _end(self, error: ApiError | None) -> None:
        """Closes the connection, after this answer if there is one to give. A client that is still sending
        may not get to see it."""
        if error is not None and not self.transport.is_closing():
            self.transport.write(_response(error))
        self.transport.close()

    @property
    def _answering(self) -> bool:
        """Whether a request is in the hands of the app, come whole or not."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _name(self) -> str:
        state: dict[str, Any] = self.scope.get("state", {}) if self.scope else {}
        host, port = self.client or ("", 0)
        return f"request_id={state.get('request_id', '')} client={host}:{port}"


_HEAD_TOO_LARGE = ApiError(
    431,
    f"The request's head is larger than {MAX_HEAD_BYTES} bytes. Send fewer headers, or shorter ones.",
    code="request_head_too_large",
)


def _late_error(receive_timeout: float) -> ApiError:
    return ApiError(
        408,
        f"The request did not arrive within {receive_timeout:g} s, nor did its body come at {BODY_RATE} "
        "bytes a second. Send it again, faster or less of it, or have the operator raise --receive-timeout.",
        code="request_incomplete",
    )


def _response(error: ApiError) -> bytes:
    body = error.body()
    return (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode() + body
