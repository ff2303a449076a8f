"""How far a batch is."""

import time
from contextlib import AbstractContextManager
from typing import Protocol

from rich.progress import Progress as Bars
from rich.progress import ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from llmboost.cli.batch.server import Batch
from llmboost.cli.progress import EVERY_S, Say, on_stderr


class Progress(Protocol):
    """What shows it."""

    def show(self, batch: Batch) -> None:
        """Takes note of how far it is."""

    def wait(self, reason: str) -> None:
        """The server is away."""


def progress() -> AbstractContextManager[Progress]:
    """What suits standard error."""
    return on_stderr(
        _Live,
        _Lines,
        TextColumn("{task.fields[failed]}", style="red"),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="yellow", markup=False),
    )


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")


class _Live:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("", total=None, failed="", note="")

    def show(self, batch: Batch) -> None:
        counts = batch.counts
        self._bars.update(
            self._task,
            description=batch.status.replace("_", " "),
            completed=counts.completed + counts.failed,
            total=counts.total or None,
            failed=f"{counts.failed} failed" if counts.failed else "",
            note="",
        )

    def wait(self, reason: str) -> None:
        self._bars.update(self._task, note=f"the server is away, asking again: {reason}")


class _Lines:
    def __init__(self, say: Say) -> None:
        self._say = say
        self._status = ""
        self._said_at = 0.0
        self._first: tuple[float, int] | None = None
        self._away = False

    def show(self, batch: Batch) -> None:
        now = time.monotonic()
        self._away = False
        counts = batch.counts
        done = counts.completed + counts.failed
        if self._first is None and counts.total:
            self._first = now, done
        if batch.status == self._status and now - self._said_at < EVERY_S:
            return
        self._status, self._said_at = batch.status, now
        line = f"{batch.id}: {batch.status.replace('_', ' ')}"
        if counts.total:
            line += f", {done} of {counts.total}"
        if counts.failed:
            line += f", {counts.failed} failed"
        if self._first is not None and done > self._first[1] and not batch.ended:
            rate = (done - self._first[1]) / (now - self._first[0])
            line += f", {rate:.1f}/s, {(counts.total - done) / rate:.0f} s left"
        self._say(line)

    def wait(self, reason: str) -> None:
        if not self._away:
            self._away = True
            self._say(f"the server is away, asking again: {reason}")
