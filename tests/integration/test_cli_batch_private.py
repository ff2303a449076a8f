"""`llmboost batch run` where there is no server: it starts one of its own."""

import os
import re
from pathlib import Path

import psutil
import pytest

from llmboost.cli import commands
from llmboost.cli.batch import options
from llmboost.cli.batch.server import Batch, Server
from llmboost.embedded import free_port
from tests.commands import ROOT, STANDINS

from .cli_batch import Run, files, ids_in, quick, write

__all__ = ["quick"]


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`llmboost batch ...` in an empty folder, and no server where one would be; stand-ins can be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "DEFAULT_URL", f"http://127.0.0.1:{free_port()}/v1")
    paths = [STANDINS, *(ROOT / name for name in ("shared", "api", "worker"))]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    return lambda *arguments: commands.run(["batch", *arguments])


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_without_a_server_one_is_started_for_the_run(alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """With the model of the first line; nothing of it is left."""
    before = children()
    write("a", "bad", "b")
    assert alone("run", "in.jsonl", "-o", "out.jsonl") == 1
    err = capsys.readouterr().err
    assert f"no server at {options.DEFAULT_URL}: tiny is served for this run alone, and then stopped" in err
    assert "2 of 3 lines answered in out.jsonl" in err
    assert files() == {"in.jsonl", "out.jsonl", "out.jsonl.errors.jsonl"}
    assert children() == before


def test_a_server_that_can_not_be_started_says_why(alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = children()
    write("a")
    assert alone("run", "in.jsonl", "-o", "out.jsonl", "--model", "unknown") == 1
    assert re.search("error: worker-0 exited .*there is no model 'unknown'", capsys.readouterr().err)
    assert files() == {"in.jsonl"}
    assert children() == before


def test_a_batch_that_runs_elsewhere_starts_no_server(alone: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert alone("run", "--batch-id", "batch_1", "-o", "out.jsonl") == 1
    assert f"nothing answers at {options.DEFAULT_URL}" in capsys.readouterr().err


def test_ctrl_c_ends_a_batch_of_ones_own_and_keeps_what_is_done(
    alone: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else could come back to it."""
    retrieve = Server.retrieve
    looks = 0

    def interrupted(self: Server, batch_id: str) -> Batch:
        nonlocal looks
        looks += 1
        if looks == 4:
            raise KeyboardInterrupt
        return retrieve(self, batch_id)

    monkeypatch.setattr(Server, "retrieve", interrupted)
    before = children()
    write(*(f"line-{n}" for n in range(100)))
    assert alone("run", "in.jsonl", "-o", "out.jsonl") == 130
    err = capsys.readouterr().err
    assert "what is done is kept" in err
    assert "of 100 lines answered in out.jsonl; the batch is cancelled\n" in err
    done = ids_in("out.jsonl")
    assert 0 < len(done) < 100
    assert done == [f"line-{n}" for n in range(len(done))]
    assert children() == before
