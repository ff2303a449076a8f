"""What stands between the product's code and the world: connections that a search answers or breaks, and time
that passes only when nothing else can happen."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from redis.asyncio.connection import AbstractConnection


@dataclass(eq=False)
class Request:
    """What was sent and not yet answered."""

    raw: bytes
    reply: "asyncio.Future[list[Any]]"


class Sender(Protocol):
    """Whose connections they are."""

    def sent(self, request: Request) -> None:
        """A request is on its way."""


class Wire(AbstractConnection):
    """A connection whose requests wait until somebody answers or breaks them."""

    def __init__(self, *, actor: Sender, **options: Any) -> None:
        super().__init__(**options)
        self._actor = actor
        self._replies: deque[Any] = deque()
        self._request: Request | None = None
        self._connected = False

    def repr_pieces(self) -> list[tuple[str, str]]:
        return []

    @property
    def is_connected(self) -> bool:
        return self._connected

    async def _connect(self) -> None:
        self._connected = True

    async def connect(self) -> None:
        self._connected = True

    async def disconnect(self, nowait: bool = False) -> None:
        self._connected = False
        self._replies.clear()

    async def can_read_destructive(self) -> bool:
        return False

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        data = command.encode() if isinstance(command, str) else command
        raw = data if isinstance(data, bytes) else b"".join(data)
        self._request = Request(raw, asyncio.get_running_loop().create_future())
        if b"BLPOP" in raw:
            self._request.reply.set_result([None])  # whether to look again is the search's to say
        else:
            self._actor.sent(self._request)

    async def read_response(self, *args: Any, **options: Any) -> Any:
        if not self._replies:
            assert self._request is not None
            try:
                self._replies.extend(await self._request.reply)
            except BaseException:
                await self.disconnect()
                raise
        reply = self._replies.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply


class Loop(asyncio.BaseEventLoop):
    """Runs until nothing but the world outside can go on; its clock jumps over what it would sleep."""

    PATIENCE_S = 1.2
    """No pause before another try is longer. No time limit is shorter: those don't pass by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._tasks: list[asyncio.Task[Any]] = []
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None or timeout > self.PATIENCE_S:
            self.stop()
        else:
            self._now += timeout
        return []

    def _process_events(self, events: list[Any]) -> None:
        pass

    def __del__(self) -> None:
        pass  # holds nothing that must be closed

    def create_task(self, *args: Any, **options: Any) -> Any:
        task = super().create_task(*args, **options)
        task._log_destroy_pending = False  # actors are left where they stand
        self._tasks.append(task)
        return task

    def living(self) -> "list[asyncio.Task[Any]]":
        """Tasks that have not ended. `asyncio.all_tasks` looks through those of all loops."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return self._tasks
