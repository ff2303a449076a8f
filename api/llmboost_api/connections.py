"""A client's connection: what it may hold of the server's memory, and for how long.

uvicorn waits without end for a request that never comes whole, and for a client that takes nothing of its
answer: once the kernel's buffer is full, not even closing the connection ends it.
"""

import asyncio
import logging
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llmboost_api.errors import ApiError

logger = logging.getLogger(__name__)

UNSENT_BYTES = 128 * 1024
"""What the kernel takes for a client whose receive window is full; by default it takes megabytes, which are
the pod's memory too. What is on its way to a client that reads is not limited by this."""


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

    1. A request has `receive_timeout` seconds to arrive whole, its head and its body; and so long may a new
       connection wait for its first. uvicorn has a limit for neither, only for the pause after a response.
    2. A client that the kernel gave up is logged.
    """

    def __init__(self, *args: Any, receive_timeout: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receive_timeout = receive_timeout
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        # Not in on_message_begin: line breaks before a request end the pause after a response but begin none.
        if self._late is None:
            self._expect_request()
        super().data_received(data)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._stop_expecting()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_expecting()
        if isinstance(exc, TimeoutError):
            logger.info("client stopped reading: %s", self._name)

    def _expect_request(self) -> None:
        self._late = self.loop.call_later(self._receive_timeout, self._on_late)

    def _stop_expecting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _on_late(self) -> None:
        self._late = None
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if self.flow.read_paused or (answering and not cycle.more_body):
            self._expect_request()  # What came is the beginning of the next request, which can wait.
            return
        logger.info("client stopped sending: %s", self._name)
        if answering and not cycle.response_started:
            self.transport.write(_too_late(self._receive_timeout))
        self.transport.close()

    @property
    def _name(self) -> str:
        state: dict[str, Any] = self.scope.get("state", {}) if self.scope else {}
        host, port = self.client or ("", 0)
        return f"request_id={state.get('request_id', '')} client={host}:{port}"


def _too_late(receive_timeout: float) -> bytes:
    body = ApiError(
        408,
        f"The request did not arrive whole within {receive_timeout:g} s. Send it again, faster or less of "
        "it, or have the operator raise --receive-timeout.",
        code="request_incomplete",
    ).body()
    return (
        b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"connection: close\r\n\r\n%b" % (len(body), body)
    )
