"""The embedded Redis: nobody else's, nothing left behind, nothing lost that was to be kept."""

import os
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from llmboost import embedded
from llmboost.embedded import EmbeddedRedis, EmbeddedRedisError
from tests.commands import Command, wait_until


def client(server: EmbeddedRedis) -> Redis:
    return Redis.from_url(server.url)


def test_it_answers_its_owner_and_nobody_else() -> None:
    with EmbeddedRedis() as server, client(server) as redis:
        assert redis.ping()
        assert "password" not in repr(server)
        connection = redis.connection_pool.connection_kwargs
        stranger = Redis(host="127.0.0.1", port=connection["port"])
        with pytest.raises(AuthenticationError):
            stranger.ping()
        assert server.child.pid
        process = psutil.Process(server.child.pid)
        assert connection["password"] not in " ".join(process.cmdline())
        assert {each.laddr.ip for each in process.net_connections() if each.status == "LISTEN"} == {
            "127.0.0.1"
        }


def test_it_writes_no_file_without_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with EmbeddedRedis() as server, client(server) as redis:
        redis.set("key", "value")
        assert server.child.pid
        files = [each.path for each in psutil.Process(server.child.pid).open_files()]
    assert files == []
    assert os.listdir(tmp_path) == []


def test_data_survive_a_stop_and_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / 'a folder with "quotes"'
    with EmbeddedRedis(folder) as server, client(server) as redis:
        redis.xadd("stream", {"n": 1}, id="1-1")
    with EmbeddedRedis(folder) as server, client(server) as redis:
        redis.xadd("stream", {"n": 2}, id="1-2")
        redis.config_set("appendfsync", "always")  # so that the kill has nothing to lose
        redis.xadd("stream", {"n": 3}, id="1-3")
        server.child.kill()
        assert server.child.wait(10)
        url = server.url
        server.start()
        assert server.url == url
        assert [entry for entry, _ in redis.xrange("stream")] == [b"1-1", b"1-2", b"1-3"]


def test_one_server_to_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_LOCK_TIMEOUT_S", 0.1)
    words = rf"in use by process {os.getpid()}: one server"
    with EmbeddedRedis(tmp_path), pytest.raises(EmbeddedRedisError, match=words):
        EmbeddedRedis(tmp_path).start()
    with EmbeddedRedis(tmp_path):
        pass


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EmbeddedRedisError, match="can't be used"):
        EmbeddedRedis(tmp_path / "file" / "folder").start()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client(server) as redis:
        redis.set("key", "value" * 100)
    log = next((tmp_path / "appendonlydir").glob("*.incr.aof"))
    log.write_bytes(b"*nonsense\r\n" + log.read_bytes())
    with pytest.raises(EmbeddedRedisError, match="Bad file format"):
        EmbeddedRedis(tmp_path).start()


def test_a_port_taken_by_somebody_else_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap between choosing a port and binding it."""
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", 0))
        thief.listen()
        taken = thief.getsockname()[1]
        free = embedded.free_port()
        ports = iter([taken, free])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with EmbeddedRedis() as server, client(server) as redis:
            assert f":{free}/" in server.url
            assert redis.ping()


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")
def test_it_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    code = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from llmboost.embedded import EmbeddedRedis\n"
        "EmbeddedRedis(Path(sys.argv[1])).start()\n"
        "print('started')\n"
        "signal.pause()\n"
    )
    with Command([sys.executable, "-c", code, str(tmp_path)]) as parent:
        parent.wait_for_line("started")
        assert len(parent.family()) == 2
        parent.signal(signal.SIGKILL)
        parent.wait()
        wait_until(lambda: not parent.family())
    with EmbeddedRedis(tmp_path):  # the lock has gone with it
        pass
