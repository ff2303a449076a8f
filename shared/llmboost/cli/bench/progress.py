"""How far a measurement is."""

import time
from collections import deque
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.progress import Progress as Bars
from rich.progress import TextColumn, TimeElapsedColumn

from llmboost.cli.bench.values import Load
from llmboost.cli.progress import EVERY_S, Say, on_stderr


@dataclass(frozen=True, slots=True)
class State:
    """Of the point under way."""

    done: int
    failed: int
    running: int
    chunks: int
    """With text, so far."""


class Progress:
    """What shows it; this one does not."""

    every = 0.25
    """Seconds between two looks."""

    def warm(self, load: Load) -> None:
        """A point begins with its warm-up."""

    def begin(self, load: Load, requests: int | None) -> None:
        """It is measured from now on. `requests`: how many, if that is known."""

    def show(self, state: State) -> None:
        """Takes note of how far it is."""


def progress() -> AbstractContextManager[Progress]:
    """What suits standard error."""
    return on_stderr(
        _Live,
        _Lines,
        TextColumn("{task.fields[running]}", style="dim"),
        TextColumn("{task.fields[speed]}", style="green"),
        TextColumn("{task.fields[failed]}", style="red"),
        TimeElapsedColumn(),
        transient=True,
    )


def described(load: Load) -> str:
    """In words."""
    return f"{load.rate:g} requests/s" if load.rate is not None else f"concurrency {load.concurrency}"


class _Live(Progress):
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("asking the server", total=None, running="", speed="", failed="")
        self._looks: deque[tuple[float, int]] = deque(maxlen=12)

    def warm(self, load: Load) -> None:
        self._bars.reset(self._task, description=f"{described(load)}: warming up", total=None)

    def begin(self, load: Load, requests: int | None) -> None:
        self._looks.clear()
        self._bars.reset(self._task, description=described(load), total=requests)

    def show(self, state: State) -> None:
        self._looks.append((time.perf_counter(), state.chunks))
        (then, before), (now, chunks) = self._looks[0], self._looks[-1]
        speed = (chunks - before) / (now - then) if now > then else 0.0
        self._bars.update(
            self._task,
            completed=state.done,
            running=f"{state.running} running",
            speed=f"{speed:.0f} tok/s",  # as long as nobody has counted them, a chunk is one
            failed=f"{state.failed} failed" if state.failed else "",
        )


class _Lines(Progress):
    def __init__(self, say: Say) -> None:
        self._say = say
        self._what = ""
        self._total = ""
        self._said_at = 0.0

    def begin(self, load: Load, requests: int | None) -> None:
        self._what = described(load)
        self._total = "" if requests is None else f" of {requests}"
        self._said_at = time.monotonic()

    def show(self, state: State) -> None:
        if time.monotonic() - self._said_at < EVERY_S:
            return
        self._said_at = time.monotonic()
        failed = f", {state.failed} failed" if state.failed else ""
        self._say(f"{self._what}: {state.done}{self._total} requests, {state.running} running{failed}")
