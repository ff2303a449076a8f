"""The supervisor, with stand-ins for pod and worker: what it starts, keeps running and leaves behind."""

import os
import re
import signal
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import psutil
import pytest
from redis import Redis

from llmboost import placement
from llmboost.placement import PlacementError, placements
from llmboost.processes import Processes, ProcessesError
from llmboost.settings import ServeSettings
from tests.commands import STANDINS, Command, llmboost, wait_until


def serve(*arguments: str, env: dict[str, str] | None = None) -> Command:
    return llmboost("serve", "--port", "0", *arguments, env=env, standins=True)


def url_of(command: Command) -> str:
    return command.wait_for_line(" is served at ").rpartition(" ")[2].removesuffix("/v1")


def get(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def redis_of(command: Command) -> Redis:
    """A client of the command's embedded Redis, whose URL its children have in their environment."""
    return Redis.from_url(command.member("api").environ()["LLMBOOST_REDIS_URL"])


def test_it_says_where_it_is_once_a_worker_serves() -> None:
    with serve("--served-model-name", "a/name,other") as command:
        url = url_of(command)
        assert get(f"{url}/ready") == 200
        assert '"model": "a/name"' in command.wait_for_line("curl -N ")
        command.signal(signal.SIGINT)
        assert command.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(number: signal.Signals, tmp_path: Path) -> None:
    with serve("--dp", "2", env={"TMPDIR": str(tmp_path)}) as command:
        url_of(command)
        assert len(command.family()) == 6  # itself, Redis, the pod, two workers, and who removes its files
        command.signal(number)
        assert command.wait() == 0
        assert command.family() == []
        assert "Traceback" not in command.log
        assert os.listdir(tmp_path) == []


def files_folder_of(command: Command) -> str | None:
    """Where the command's pod keeps files; None: where a pod does by itself."""
    return command.member("api").environ().get("LLMBOOST_FILES_URL")


def test_files_are_kept_for_as_long_as_redis_is_kept(tmp_path: Path, redis_url: str) -> None:
    """Without a data folder neither is: a signal leaves nothing behind."""
    data, temporary = tmp_path / "data", tmp_path / "temporary"
    temporary.mkdir()
    with serve(env={"TMPDIR": str(temporary)}) as command:
        url_of(command)
        (folder,) = temporary.iterdir()
        assert files_folder_of(command) == str(folder)
        (folder / "file-1").write_text("x")
        command.signal(signal.SIGTERM)
        assert command.wait() == 0
    assert os.listdir(temporary) == []
    for flags, expected in (
        (["--data-dir", str(data)], str(data / "files")),
        (["--redis-url", redis_url], None),
        (["--files-url", str(tmp_path)], str(tmp_path)),
    ):
        with serve(*flags, env={"TMPDIR": str(temporary)}) as command:
            url_of(command)
            assert files_folder_of(command) == expected
            assert os.listdir(temporary) == []


def test_a_signal_while_it_starts(tmp_path: Path) -> None:
    with serve(env={"TMPDIR": str(tmp_path)}) as command:
        command.wait_for_line("threads=", among="err")
        command.signal(signal.SIGTERM)
        assert command.wait() == 0
        assert command.family() == []
        assert "Traceback" not in command.log


def chunk(data: bytes) -> bytes:
    """A part of a body in chunked encoding; its end if there is nothing in it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@contextmanager
def running_response(url: str) -> Iterator[tuple[HTTPConnection, HTTPResponse]]:
    """A response of which the beginning has come; it goes on with what is sent."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    with closing(connection):
        connection.putrequest("POST", "/echo/")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders(chunk(b"first"))
        response = connection.getresponse()
        assert response.read(5) == b"first"
        yield connection, response


def test_running_responses_end_before_anything_is_stopped() -> None:
    with serve() as command:
        with running_response(url_of(command)) as (connection, response):
            command.signal(signal.SIGINT)
            command.wait_for_line("Shutting down", among="err")
            connection.send(chunk(b"second") + chunk(b""))
            assert response.read() == b"second"
            assert len(command.members("worker")) == 1
        assert command.wait() == 0


def test_a_second_signal_ends_at_once() -> None:
    with serve() as command:
        with running_response(url_of(command)):
            command.signal(signal.SIGINT)
            command.wait_for_line("Shutting down", among="err")
            command.signal(signal.SIGINT)
            assert command.wait() == 130
        assert command.family() == []
        assert "Traceback" not in command.log


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")
def test_a_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    with serve("--dp", "2", env={"TMPDIR": str(tmp_path)}) as command:
        url_of(command)
        command.signal(signal.SIGKILL)
        command.wait()
        wait_until(lambda: not command.family())
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("victim", ["worker", "api"])
def test_a_killed_process_is_restarted(victim: str) -> None:
    with serve() as command:
        url = url_of(command)
        before = command.member(victim)
        before.kill()
        command.wait_for_line("was ended by SIGKILL", among="err")
        wait_until(lambda: command.members(victim) not in ([], [before]))
        wait_until(lambda: get(f"{url}/ready") == 200)
        command.signal(signal.SIGINT)
        assert command.wait() == 0


def test_a_killed_redis_comes_back_with_its_data(tmp_path: Path) -> None:
    with serve("--data-dir", str(tmp_path)) as command:
        url = url_of(command)
        with redis_of(command) as redis:
            redis.config_set("appendfsync", "always")
            redis.set("key", "value")
            (server,) = [each for each in command.family() if "valkey" in each.name()]
            server.kill()
            command.wait_for_line("redis was ended by SIGKILL", among="err")
            wait_until(lambda: get(f"{url}/ready") == 200)
            assert redis.get("key") == b"value"
        command.signal(signal.SIGINT)
        assert command.wait() == 0


def test_a_data_folder_survives_a_restart(tmp_path: Path) -> None:
    for run in (1, 2):
        with serve("--data-dir", str(tmp_path)) as command:
            url_of(command)
            with redis_of(command) as redis:
                assert redis.incr("runs") == run
            command.signal(signal.SIGINT)
            assert command.wait() == 0


def test_a_data_folder_in_use_is_refused(tmp_path: Path) -> None:
    with serve("--data-dir", str(tmp_path)) as first:
        url_of(first)
        with serve("--data-dir", str(tmp_path)) as second:
            assert second.wait() == 1
            assert "is in use by process" in second.err[-1]
            assert "Traceback" not in second.log
        first.signal(signal.SIGINT)
        assert first.wait() == 0


def test_a_model_that_does_not_exist_ends_it_with_the_reason(tmp_path: Path) -> None:
    with serve("unknown", env={"TMPDIR": str(tmp_path)}) as command:
        assert command.wait() == 1
        assert re.search(r"worker-0 exited with code 1: .*there is no model 'unknown'", command.err[-1])
        assert command.out == []
        assert command.family() == []
        assert os.listdir(tmp_path) == []


def test_a_worker_that_is_killed_again_and_again_ends_it() -> None:
    with serve("crash") as command:
        assert command.wait() == 1
        assert "worker-0 was ended by SIGKILL (out of memory?), 3 times in a row" in command.err[-1]


def test_it_says_what_it_waits_for_while_redis_is_away() -> None:
    with serve("--redis-url", "redis://127.0.0.1:1/0") as command:
        assert "Redis" in command.wait_for_line("waiting for", among="err")
        command.signal(signal.SIGINT)
        assert command.wait() == 0


def test_a_given_redis_is_used_and_left_running(redis_url: str) -> None:
    with serve("--redis-url", redis_url) as command:
        url_of(command)
        assert len(command.family()) == 3
        command.signal(signal.SIGINT)
        assert command.wait() == 0
    with Redis.from_url(redis_url) as redis:
        assert redis.ping()
        redis.flushall()


# As a part of another program, which is how the SDK uses it.


@pytest.fixture
def _standins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STANDINS), os.environ.get("PYTHONPATH", "")]))
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) - before == set()


@pytest.mark.usefixtures("_standins")
def test_workers_without_a_pod() -> None:
    with Processes(ServeSettings(model="some/model", dp=2), api=False) as processes:
        assert processes.model == "some/model"
        with Redis.from_url(processes.redis_url) as redis:
            assert redis.zcard("llmboost:workers") == 2


@pytest.mark.usefixtures("_standins")
def test_a_failure_to_start_is_an_exception_with_the_log() -> None:
    with pytest.raises(ProcessesError, match="no model 'unknown'") as error:
        Processes(ServeSettings(model="unknown"), api=False).start()
    assert "threads=" in error.value.log


@pytest.mark.usefixtures("_standins")
def test_a_signal_that_another_thread_is_given_is_heard_by_who_waits() -> None:
    """The system chooses the thread; the handler runs in the main one, when that is back from waiting."""
    heard, in_time = threading.Event(), []
    main = threading.main_thread().ident

    def is_waiting() -> bool:
        return any(frame.name == "wait" for frame in traceback.extract_stack(sys._current_frames()[main]))

    def send() -> None:
        wait_until(is_waiting)
        signal.raise_signal(signal.SIGUSR1)  # to this thread
        in_time.append(heard.wait(5))
        processes.request_stop()

    before = signal.signal(signal.SIGUSR1, lambda *_: heard.set())
    try:
        with Processes(ServeSettings(model="some/model"), api=False) as processes:
            sender = threading.Thread(target=send)
            sender.start()
            processes.wait()
            sender.join()
            assert in_time == [True]
    finally:
        signal.signal(signal.SIGUSR1, before)


# Which worker gets what.


def test_workers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_cores", lambda: 8)
    monkeypatch.setattr(placement, "gpus", list)
    assert placements(ServeSettings(dp=3)) == [{"LLMBOOST_THREADS": "2"}] * 3
    assert placements(ServeSettings(dp=1)) == [{}]
    assert placements(ServeSettings(dp=2, threads=5)) == [{}, {}]


def test_workers_get_gpus_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "gpus", lambda: ["0", "1", "2", "3"])

    def visible(**settings: object) -> list[str | None]:
        placed = placements(ServeSettings(threads=1, **settings))
        return [each.get("CUDA_VISIBLE_DEVICES") for each in placed]

    assert visible(dp=2) == ["0", "1"]
    assert visible(dp=2, tp=2) == visible(dp=2, pp=2) == ["0,1", "2,3"]
    assert visible(dp=1, tp=2, pp=2) == ["0,1,2,3"]
    assert visible(dp=5) == ["0", "1", "2", "3", "0"]
    assert visible(dp=2, device="cpu") == [None, None]
    assert visible(dp=1, device="cuda:3") == [None]
    with pytest.raises(PlacementError, match="needs 6 GPUs, but there are 4"):
        visible(dp=3, tp=2)
    with pytest.raises(PlacementError, match="--tp 2 times --pp 2 needs 8 GPUs"):
        visible(dp=2, tp=2, pp=2)


@pytest.mark.parametrize(("value", "expected"), [("2,3", ["2", "3"]), ("", []), ("-1", [])])
def test_only_visible_gpus_are_given_out(
    value: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert placement.gpus() == expected
