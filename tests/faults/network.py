"""The network between Redis and everyone else, which may do to them what networks do."""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from llmboost.embedded import free_port

HOST = "127.0.0.1"
CHUNK = 64 * 1024
ABRUPTLY = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing then resets the connection."""


class Network:
    """A TCP proxy in front of a local port, in a thread of its own.

    Faults last until `heal`, and reach connections that are open too.
    """

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self.resets = 0
        """Connections that were reset."""
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._links: set[Link] = set()
        self.passing = asyncio.Event()
        self.delay_s = 0.0
        self.lost_share = 0.0
        self.random = random.Random(0)
        self._refusing = False

    def __enter__(self) -> "Network":
        async def listen() -> asyncio.Server:
            self.passing.set()
            return await asyncio.start_server(self._connect, HOST, self.port, backlog=1024)

        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(listen(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def close() -> None:
            self._server.close()
            self._reset_all()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Faults

    def drop(self) -> None:
        """Nothing arrives and nothing is refused. What is sent meanwhile arrives after `heal`, as TCP has it,
        though whoever sent it may have given up by then."""
        self._do(self.passing.clear)

    def refuse(self) -> None:
        """All connections are reset, and so is everyone who tries again."""

        def refuse() -> None:
            self._refusing = True
            self._reset_all()

        self._do(refuse)

    def reset(self) -> None:
        """All connections are reset once."""
        self._do(self._reset_all)

    def delay(self, seconds: float) -> None:
        """What is sent, either way, arrives so much later."""

        def delay() -> None:
            self.delay_s = seconds

        self._do(delay)

    def lose_replies(self, share: float, seed: int) -> None:
        """That share of what Redis sends ends somewhere, perhaps before its first byte, in a reset."""

        def lose() -> None:
            self.lost_share, self.random = share, random.Random(seed)

        self._do(lose)

    def heal(self) -> None:
        """No fault any more."""

        def heal() -> None:
            self._refusing, self.delay_s, self.lost_share = False, 0.0, 0.0
            self.passing.set()

        self._do(heal)

    # In the thread

    def _do(self, change: Callable[[], None]) -> None:
        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    def _reset_all(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(self, writer)
        self._links.add(link)
        with suppress(asyncio.CancelledError):  # by `close`; asyncio would report it
            await self._carry(link, reader, writer)

    async def _carry(self, link: "Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._refusing:
                raise ConnectionResetError
            await self.passing.wait()
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target)
            link.writers.append(far_writer)
            await asyncio.gather(
                link.carry(reader, far_writer), link.carry(far_reader, writer, are_replies=True)
            )
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            for each in link.writers:
                each.close()


class Link:
    """One connection through the network."""

    def __init__(self, network: Network, writer: asyncio.StreamWriter) -> None:
        self.writers = [writer]
        """Towards its two ends."""
        self._network = network

    def reset(self) -> None:
        self._network.resets += 1
        for writer in self.writers:
            with suppress(OSError):
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPTLY)
            writer.transport.abort()

    async def carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, are_replies: bool = False
    ) -> None:
        """One direction, to its end."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivery = asyncio.create_task(self._deliver(under_way, sink, are_replies))
        now = asyncio.get_running_loop().time
        try:
            while data := await source.read(CHUNK):
                under_way.put_nowait((now() + self._network.delay_s, data))
        finally:
            # What is under way arrives, and then the end.
            under_way.put_nowait((now() + self._network.delay_s, b""))
            await delivery

    async def _deliver(
        self,
        under_way: "asyncio.Queue[tuple[float, bytes]]",
        sink: asyncio.StreamWriter,
        are_replies: bool,
    ) -> None:
        network = self._network
        now = asyncio.get_running_loop().time
        while True:
            due, data = await under_way.get()
            if due > now():
                await asyncio.sleep(due - now())  # the line's delay
            await network.passing.wait()
            if not data:
                sink.close()
                return
            if are_replies and network.random.random() < network.lost_share:
                sink.write(data[: network.random.randrange(len(data))])
                await sink.drain()
                self.reset()
                return
            sink.write(data)
            await sink.drain()
