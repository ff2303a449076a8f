"""uvicorn, made to let running streams finish when the process is told to go."""

import asyncio
import logging
import math
import signal
import socket
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from llmboost import garbage
from llmboost.settings import ApiSettings
from llmboost_api.connections import ClientConnection, limit_writes

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than reverse proxies keep idle connections, or they would send requests into closed ones."""
LAST_WORDS_S = 5
"""After the drain: for what still runs to send its error frame, before uvicorn cancels it."""


class PodServer(uvicorn.Server):
    """Differs from uvicorn's server in this:

    1. `shutdown` gives running responses `drain_timeout` seconds, and then has those that are left end in
       an error that their clients can read, where uvicorn would cut them off. It does cut off a client that
       reads nothing. Meanwhile it hands its batches over.
    2. `handle_exit` does not raise the signal again afterwards: a drained pod ends with status 0. A second
       signal of either kind, not SIGINT alone, stops the waiting.
    3. sse-starlette ends all streams as soon as the process is told to go; that is switched off.
    4. One line in the log when it is ready, with the port that it got.
    5. Clients that stall, reading or sending, are let go of: see `connections`.
    """

    def __init__(self, app: FastAPI, settings: ApiSettings) -> None:
        AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                lifespan="on",
                http=partial(ClientConnection, receive_timeout=settings.receive_timeout),  # type: ignore[arg-type]
                ws="none",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(settings.drain_timeout) + LAST_WORDS_S,
            )
        )
        self._app = app
        self._settings = settings

    @property
    def port(self) -> int:
        """The port it listens on; once it has started."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in self.servers[0].sockets:
            limit_writes(listener, self._settings.send_timeout)
        garbage.settle()
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        logger.info("ready: serving on http://%s:%d", host, self.port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # At once, so that another pod goes on with its batches while this one waits for its streams.
        handing_over = asyncio.create_task(self._app.state.batch_runner.stop())
        running = len(self._app.state.pod.generations.running)
        logger.info("draining: running=%d timeout=%gs", running, self._settings.drain_timeout)
        ending = asyncio.get_running_loop().call_later(self._settings.drain_timeout, self._end_what_runs)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await handing_over

    def _end_what_runs(self) -> None:
        self._app.state.pod.generations.end_all()
        for connection in list(self.server_state.connections):
            assert isinstance(connection, ClientConnection)
            connection.end_if_stalled()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del frame
        if self.should_exit:
            logger.warning("%s again: not waiting for what still runs", signal.Signals(sig).name)
            self.force_exit = True
        self.should_exit = True
