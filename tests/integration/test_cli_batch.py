"""`llmboost batch`, against a server that knows files and batches and runs nothing."""

import io
import json
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from llmboost.cli import commands
from llmboost.cli.batch import options
from llmboost.cli.batch.server import Server
from llmboost.embedded import free_port
from tests.commands import llmboost, wait_until
from tests.standins.batches import FakeBatches, FakeServer

from .cli_batch import Run, files, ids_in, quick, write

__all__ = ["quick"]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    running = FakeServer(FakeBatches(), free_port())
    running.start()
    yield running
    running.stop()


@pytest.fixture
def batch(fake: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`llmboost batch ...` in an empty folder, with that server."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMBOOST_URL", fake.url)
    return lambda *arguments: commands.run(["batch", *arguments])


def test_a_file_is_answered_into_another(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write(*(f"line-{n}" for n in range(2500)), url="/v1/completions")
    assert batch("run", "in.jsonl", "-o", "out.jsonl", "--metadata", "a=b=c", "--completion-window=1h") == 0
    assert ids_in("out.jsonl") == [f"line-{n}" for n in range(2500)]
    assert files() == {"in.jsonl", "out.jsonl"}
    (made,) = fake.batches.batches.values()
    assert fake.batches.files[made["input_file_id"]] == Path("in.jsonl").read_bytes()
    assert (made["endpoint"], made["completion_window"]) == ("/v1/completions", "1h")
    assert made["metadata"] == {"a": "b=c"}
    out, err = capsys.readouterr()
    assert not out
    assert f"in.jsonl: 2500 lines are {made['id']} at {fake.url}" in err
    assert f"{made['id']}: completed, 2500 of 2500" in err
    assert f"{made['id']}: 2500 of 2500 lines answered in out.jsonl\n" in err


def test_lines_that_failed_are_in_a_file_of_their_own(batch: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write("a", "bad-1", "b", "bad-2")
    assert batch("run", "-i", "in.jsonl", "--output-file", "out.jsonl") == 1
    assert (ids_in("out.jsonl"), ids_in("out.jsonl.errors.jsonl")) == (["a", "b"], ["bad-1", "bad-2"])
    assert "2 of 4 lines answered in out.jsonl; the others, with the reasons, in out.jsonl.errors.jsonl" in (
        capsys.readouterr().err
    )
    assert batch("run", "in.jsonl", "-o", "out.jsonl", "--errors", "failed") == 1
    assert ids_in("failed") == ["bad-1", "bad-2"]
    write("bad-1")
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert Path("out.jsonl").read_bytes() == b""


def test_standard_input_and_output(
    batch: Run, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    write("a", "bad", "b")
    text = io.BytesIO(Path("in.jsonl").read_bytes())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=text))
    assert batch("run", "-", "-o", "-") == 1
    assert [json.loads(line)["custom_id"] for line in capfdbinary.readouterr().out.splitlines()] == ["a", "b"]
    assert ids_in("batch.errors.jsonl") == ["bad"]


def test_a_line_that_is_not_json_is_named_before_anything_is_sent(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a", "b", "c", "d", "e")
    lines = Path("in.jsonl").read_text().splitlines()
    lines[2], lines[4] = lines[2][:-5], "[1]"
    Path("in.jsonl").write_text("\n".join(lines))
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 2
    err = capsys.readouterr().err
    assert "in.jsonl:3: not JSON: Input data was truncated" in err
    assert "in.jsonl:5: no request of a batch: Expected `object`, got `array`" in err
    assert not fake.batches.requests
    assert files() == {"in.jsonl"}


def test_a_file_from_an_editor_that_marks_it_is_taken(batch: Run) -> None:
    """A byte order mark, line ends of Windows, blank lines at the end: the server takes them too."""
    write("a", "b")
    text = Path("in.jsonl").read_text().replace("\n", "\r\n")
    Path("in.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 2


def test_lines_that_the_server_refuses_are_named(batch: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write("a", "b", "c")
    Path("in.jsonl").write_text(Path("in.jsonl").read_text().replace('"custom_id": "b", ', ""))
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert "in.jsonl:2: custom_id is missing.\n" in capsys.readouterr().err
    assert files() == {"in.jsonl"}


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_whatever_breaks_is_done_again_and_makes_one_batch(
    fake: FakeServer, batch: Run, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the server has done what it was asked for, and only the answer is lost."""
    write("a", "bad", "b")
    fake.batches.step = 1
    steps = ("POST /v1/files", "POST /v1/batches", "GET /v1/batches", "GET /v1/files", "GET /v1/files")
    fake.batches.fail = [(step, status) for step in steps for _ in range(2)]
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert not fake.batches.fail
    assert len(fake.batches.batches) == 1
    assert (ids_in("out.jsonl"), ids_in("out.jsonl.errors.jsonl")) == (["a", "b"], ["bad"])
    assert "the server is away, asking again" in capsys.readouterr().err


def test_a_server_that_goes_away_is_waited_for(fake: FakeServer, batch: Run) -> None:
    write(*"abcdef")
    fake.batches.step = 1
    outcome: list[int] = []
    runs = threading.Thread(target=lambda: outcome.append(batch("run", "in.jsonl", "-o", "out.jsonl")))
    runs.start()
    for _ in range(2):
        asked = len(fake.batches.requests)
        wait_until(lambda asked=asked: len(fake.batches.requests) > asked + 1)  # type: ignore[misc]
        fake.stop()
        fake.start()
    runs.join(30)
    assert outcome == [0]
    assert ids_in("out.jsonl") == list("abcdef")


def test_a_server_that_keeps_failing_is_believed(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a")
    fake.batches.fail = [("POST /v1/files", 500)] * 9
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert len(fake.batches.fail) == 4
    assert f"llmboost batch: error: {fake.url}: Planned: 500. (status 500)" in capsys.readouterr().err


def test_a_download_that_breaks_off_leaves_nothing_half(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was there before stays."""
    write(*"abc")
    Path("out.jsonl").write_text("before")
    fake.batches.fail = [("GET /v1/files", 0), ("GET /v1/files", 404)]
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert "Planned: 404." in capsys.readouterr().err
    assert files() == {"in.jsonl", "out.jsonl"}
    assert Path("out.jsonl").read_text() == "before"


def test_a_key_that_is_missing_or_wrong(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write("a")
    fake.batches.key = "right"
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert "--api-key (or LLMBOOST_API_KEY): a key is needed: " in capsys.readouterr().err
    assert batch("run", "in.jsonl", "-o", "out.jsonl", "--api-key", "hunter2") == 1
    err = capsys.readouterr().err
    assert "the key was refused: " in err
    assert "The API key is wrong. (status 401)" in err
    assert "hunter2" not in err
    assert batch("run", "in.jsonl", "-o", "out.jsonl", "--api-key", "right") == 0
    monkeypatch.setenv("LLMBOOST_API_KEY", "right, other")
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 0


def test_a_batch_can_be_come_back_to_shown_and_cancelled(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a", "b", "c")
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 0
    (batch_id,) = fake.batches.batches
    assert batch("run", "--batch-id", batch_id, "-o", "again.jsonl") == 0
    assert ids_in("again.jsonl") == ["a", "b", "c"]
    capsys.readouterr()
    assert batch("show", batch_id) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["id"], shown["status"]) == (batch_id, "completed")
    assert batch("cancel", batch_id) == 0
    assert capsys.readouterr().out == f"{batch_id}: cancelling\n"
    assert batch("run", "--batch-id", batch_id, "-o", "rest.jsonl") == 1
    assert "; the batch is cancelled\n" in capsys.readouterr().err
    assert batch("show", "batch_none") == 1
    assert "There is no batches/batch_none here. (status 404)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("runn", "unknown command 'runn': did you mean run?"),
        ("frobnicate", "it is one of run, show, cancel"),
        ("run in.jsonl", "-o FILE is needed"),
        ("run -o out", "an input is needed"),
        ("run in.jsonl other -o out", "unrecognized arguments: other"),
        ("run in.jsonl -i other -o out", "two inputs are given"),
        ("run in.jsonl -o out --batch-id batch_1", "leave 'in.jsonl' out"),
        ("run -o out --batch-id batch_1 --model m", "a batch that has begun: leave --model out"),
        ("run in.jsonl -o no/such/out", "-o 'no/such/out': the folder 'no/such' does not exist"),
        ("run in.jsonl -o .", "-o '.' is a folder"),
        ("run in.jsonl -o in.jsonl", "-o 'in.jsonl' is the input"),
        ("run in.jsonl -o out --errors in.jsonl", "--errors 'in.jsonl' is the input"),
        ("run none.jsonl -o out", "input 'none.jsonl': No such file or directory"),
        ("run empty -o out", "empty holds no line"),
        ("run in.jsonl -o out --metadata a", "--metadata 'a' must be KEY=VALUE"),
        ("run in.jsonl -o out --url localhost:8011", "--url 'localhost:8011' must be such as http://"),
        ("run in.jsonl -o out --outptu x", "unknown flag --outptu: did you mean --output?"),
        ("run in.jsonl -o out --base-url x", "unknown flag --base-url: use --url"),
        ("run nourl -o out", "the first line of nourl names no url"),
        ("show", "the id of a batch is needed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    line: str, words: str, batch: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    write("a")
    Path("empty").write_text("\n\n")
    Path("nourl").write_text('{"custom_id": "a", "body": {}}\n')
    assert batch(*line.split()) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert err.count("\n") == 1
    assert err.startswith("llmboost batch")
    assert not out


def test_help(batch: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert batch() == 2
    assert batch("--help") == 0
    assert "llmboost batch run INPUT -o OUTPUT" in capsys.readouterr().out
    for command in ("run", "show", "cancel"):
        with pytest.raises(SystemExit) as end:
            batch(command, "--help")
        assert end.value.code == 0
        assert "LLMBOOST_URL" in capsys.readouterr().out


def test_a_server_of_another_kind(
    batch: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeBatches, "keep", lambda self, content: 7)
    write("a")
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 1
    assert (
        "POST /v1/files is answered in a way that is not OpenAI's: Expected `str`" in capsys.readouterr().err
    )


def test_a_host_alone_gets_its_path() -> None:
    for given, meant in [
        ("http://h:1", "http://h:1/v1"),
        ("http://h/", "http://h/v1"),
        ("http://h/x/", "http://h/x"),
    ]:
        parsed, _ = options.parse_one("show", "", ["batch_1", "--url", given])
        assert parsed.url == meant


def test_a_named_server_that_does_not_answer(batch: Run, capsys: pytest.CaptureFixture[str]) -> None:
    write("a")
    url = f"http://127.0.0.1:{free_port()}"
    for line in (["run", "in.jsonl", "-o", "out"], ["run", "--batch-id", "b", "-o", "out"]):
        assert batch(*line, "--url", url) == 1
        err = capsys.readouterr().err
        assert f"error: nothing answers at {url}/v1 (" in err
        assert "llmboost serve" in err
    assert batch("show", "b", "--url", url) == 1
    assert "does not answer" in capsys.readouterr().err


def test_ctrl_c_leaves_the_batch_running_and_says_how_to_come_back(fake: FakeServer, tmp_path: Path) -> None:
    fake.batches.step = 0
    (tmp_path / "in.jsonl").write_text(
        '{"custom_id": "a", "url": "/v1/completions", "body": {"model": "m"}}\n'
    )
    with llmboost("batch", "run", "in.jsonl", "-o", "o.jsonl", "--url", fake.url, cwd=tmp_path) as command:
        command.wait_for_line("in progress", among="err")
        command.signal(signal.SIGINT)
        assert command.wait() == 130
        (batch_id,) = fake.batches.batches
        err = "\n".join(command.err)
    assert f"{batch_id} goes on at the server" in err
    assert f"  llmboost batch run --batch-id {batch_id} -o o.jsonl --url {fake.url}" in err
    assert f"  llmboost batch cancel {batch_id} --url {fake.url}" in err
    assert "Traceback" not in err
    assert fake.batches.batches[batch_id]["status"] == "in_progress"


def test_ctrl_c_in_the_download_says_how_to_fetch_the_answers(
    fake: FakeServer, batch: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Server, file_id: str, into: BinaryIO) -> None:
        into.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "download", interrupted)
    write("a")
    assert batch("run", "in.jsonl", "-o", "out.jsonl") == 130
    (batch_id,) = fake.batches.batches
    err = capsys.readouterr().err
    assert f"{batch_id} has ended. To fetch the answers:" in err
    assert "cancel" not in err
    assert files() == {"in.jsonl"}
