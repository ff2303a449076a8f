"""Commands of ours as real processes, their output read as it comes, and what they leave behind."""

import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
STANDINS = ROOT / "tests" / "standins"
_SOURCES = [str(ROOT / name) for name in ("shared", "api", "worker")]
_MARK = "TEST_COMMAND_MARK"

PROGRAM = os.environ.get("LLMBOOST_TEST_PROGRAM", "llmboost")
"""The module that is run as `llmboost`; another one, in `tests`, may change the product first. Read by the
tests alone: what they start does not see it."""


class Command:
    """A running command; on exit it and everything it started is killed."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        path: Sequence[Path] = (),
    ) -> None:
        """`path` comes before our sources where Python looks for modules."""
        self.mark = secrets.token_hex(8)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLMBOOST_")}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            start_new_session=True,  # a group to kill: not everything keeps its environment readable
            env={
                **inherited,
                "PYTHONPATH": os.pathsep.join([*map(str, path), *_SOURCES]),
                "PYTHONUNBUFFERED": "1",
                **(env or {}),
                _MARK: self.mark,
            },
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, self.out), daemon=True),
            threading.Thread(target=self._read, args=(self.process.stderr, self.err), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, source: Iterable[str], lines: list[str]) -> None:
        for line in source:
            lines.append(line.rstrip("\n"))
            self._news.put(None)
        self._news.put(None)

    @property
    def log(self) -> str:
        """All it has written, for a failure's message."""
        return "\n".join(["--- out", *self.out, "--- err", *self.err])

    def wait_for_line(self, part: str, *, among: str = "out", count: int = 1, within: float = 60.0) -> str:
        """Waits for the `count`-th line with `part` in it."""
        deadline = time.monotonic() + within
        while True:
            lines = [line for line in list(getattr(self, among)) if part in line]
            if len(lines) >= count:
                return lines[count - 1]
            if not any(reader.is_alive() for reader in self._readers):
                raise AssertionError(f"ended without {part!r}:\n{self.log}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {part!r} within {within} s:\n{self.log}")
            with suppress(queue.Empty):
                self._news.get(timeout=0.2)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, within: float = 60.0) -> int:
        """Its exit code, once it has ended and its output is read."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {within} s:\n{self.log}") from None
        for reader in self._readers:
            reader.join(timeout=10)
        return code

    def family(self) -> list[psutil.Process]:
        """Every living process that came from this command, orphans included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def members(self, part: str) -> list[psutil.Process]:
        """Those of the family with `part` among the words of their command line."""
        found = []
        for process in self.family():
            with suppress(psutil.Error):  # it may end meanwhile
                if part in process.cmdline():
                    found.append(process)
        return found

    def member(self, part: str) -> psutil.Process:
        """The one process of the family with `part` among the words of its command line."""
        (process,) = self.members(part)
        return process

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in self.family():
            process.kill()
        for reader in self._readers:
            reader.join(timeout=10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()


def llmboost(
    *arguments: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    standins: bool = False,
) -> Command:
    """A command line of ours; with `standins`, its pods and workers are those of tests/standins."""
    path = [STANDINS] if standins else []
    return Command(command_line(*arguments), env=env, cwd=cwd, path=[*path, *program_path()])


def command_line(*arguments: str) -> list[str]:
    """A command line of ours, as a list of words."""
    return [sys.executable, "-P", "-m", PROGRAM, *arguments]


def program_path() -> list[Path]:
    """Where Python finds the program, besides our sources."""
    return [] if PROGRAM == "llmboost" else [ROOT]


def wait_until(condition: Callable[[], T], *, within: float = 20.0, every: float = 0.01, what: str = "") -> T:
    """Polls until `condition()` is true and returns its value, from code that isn't async."""
    deadline = time.monotonic() + within
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {within} s: {what or condition}")
        time.sleep(every)
    return value
