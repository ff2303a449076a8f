"""How far a batch is, as `llmboost batch run` shows it."""

import io

import pytest
from rich.console import Console

from llmboost.cli.batch import progress
from llmboost.cli.batch.server import Batch, Counts


def some(completed: int, failed: int = 0, status: str = "in_progress") -> Batch:
    return Batch("batch_1", status, Counts(200, completed, failed))


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr("llmboost.cli.progress.Console", lambda stderr: console)
    with progress.progress() as shown:
        for step in (some(0), some(60, 4)):
            shown.show(step)
        shown.wait("[refused]")
    last = screen.getvalue()
    for words in ("in progress", "64/200", "4 failed", "the server is away, asking again: [refused]"):
        assert words in last


def test_elsewhere_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    with progress.progress() as shown:
        for clock in range(21):
            shown.show(some(5 * clock, clock % 2))
        shown.wait("refused")
        shown.wait("refused")
        shown.show(some(200, status="completed"))
    assert capsys.readouterr().err.splitlines() == [
        "batch_1: in progress, 0 of 200",
        "batch_1: in progress, 50 of 200, 5.0/s, 30 s left",
        "batch_1: in progress, 100 of 200, 5.0/s, 20 s left",
        "the server is away, asking again: refused",
        "batch_1: completed, 200 of 200",
    ]
