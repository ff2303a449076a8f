"""`llmboost serve` as a user has it: real processes, the demo model, curl."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.commands import Command, llmboost, wait_until

pytestmark = pytest.mark.timeout(600)
LOADING_S = 240.0
"""A worker imports torch and loads the model; on a busy machine that takes its time."""


def paste(command: Command) -> list[dict[str, object]]:
    """Runs the line that `serve` prints as a shell would; returns the chunks of a stream that ended well."""
    line = command.wait_for_line("curl -N ", within=LOADING_S)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=LOADING_S, check=True)
    data = [each.removeprefix("data: ") for each in done.stdout.splitlines() if each.startswith("data: ")]
    assert data, done.stdout
    assert data[-1] == "[DONE]", data[-1]
    return [json.loads(each) for each in data[:-1]]


def story(chunks: list[dict[str, object]]) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]  # type: ignore[attr-defined]
    )


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_a_session(tmp_path: Path) -> None:
    """It starts, answers the line it prints, outlives its worker, and leaves nothing behind at Ctrl-C."""
    with llmboost("serve", "--port", "0", env={"TMPDIR": str(tmp_path)}) as command:
        chunks = paste(command)
        assert len(story(chunks).split()) > 10
        assert {chunk["model"] for chunk in chunks} == {"llmboost-demo"}

        worker = command.member("worker")
        worker.kill()
        command.wait_for_line("worker-0 was ended by SIGKILL", among="err")
        # The pod accepts the request at once; it waits in the queue for the worker that is being started.
        assert len(story(paste(command)).split()) > 10
        assert command.member("worker").pid != worker.pid

        command.signal(signal.SIGINT)
        assert command.wait(within=90) == 0
        assert command.family() == []
        assert list(tmp_path.iterdir()) == []
        assert "Traceback" not in command.log


def test_killed_while_a_stream_runs(tmp_path: Path) -> None:
    """kill -9 of the supervisor: no process, no folder, no port is left."""
    with llmboost("serve", "--port", "0", "--dp", "2", env={"TMPDIR": str(tmp_path)}) as command:
        url = command.wait_for_line(" is served at ", within=LOADING_S).rpartition(" ")[2]
        body = {
            "model": "llmboost-demo",
            "messages": [{"role": "user", "content": "Hello"}],
            "stream": True,
            "max_tokens": 1500,
            "min_tokens": 1500,
        }
        curl = ["curl", "-sN", f"{url}/chat/completions", "-H", "Content-Type: application/json"]
        with subprocess.Popen([*curl, "-d", json.dumps(body)], stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout
            assert any(line.startswith("data: ") for line in client.stdout)
            ports = {
                listening.laddr.port
                for each in command.family()
                for listening in each.net_connections()
                if listening.status == psutil.CONN_LISTEN
            }
            assert len(ports) == 2  # the pod's and Redis's
            command.signal(signal.SIGKILL)
            assert "[DONE]" not in client.stdout.read()
        command.wait()
        wait_until(lambda: not command.family())
        assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_ends_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with llmboost("serve", "./empty", "--port", "0", cwd=tmp_path) as command:
        assert command.wait(within=LOADING_S) == 1
        assert command.out == []
        assert "worker-0 exited with code 78: llmboost worker:" in command.err[-1]
        assert "./empty" in command.err[-1]
        assert command.family() == []
