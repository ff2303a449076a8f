"""A rehearsal of the compose file without a container engine.

Every service's own command runs as a process on loopback, in its own environment, after the services it
depends on are healthy by their own health checks. What a container would have had of its own, its
addresses and folders, is put in its place by the explicit table in `Rehearsal.replace`.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import OpenAI
from redis import Redis

from llmboost.embedded import free_port
from tests.commands import ROOT, Command, wait_until

COMPOSE = ROOT / "compose"
HEALTHY_WITHIN_S = 240.0
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
MISSING = [
    name for name in ("redis-server", "redis-cli", "nginx", "curl") if not shutil.which(name, path=PATH)
]

pytestmark = pytest.mark.timeout(600)


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / name).read_text())
    return loaded


DOTENV = {"LLMBOOST_THREADS": "1"}
"""As if it stood in `.env`: several workers on a small machine."""


def interpolate(text: str) -> str:
    """`${NAME:-default}`."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: DOTENV.get(match[1], match[2]), text)


class Rehearsal:
    """The services of compose.yaml, as processes."""

    def __init__(self, folder: Path) -> None:
        self.services: dict[str, Any] = load("compose.yaml")["services"]
        self.folder = folder
        self.ports = {name: free_port() for name in ("redis", "api-1", "api-2", "proxy")}
        self.running: dict[str, Command] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['proxy']}"

    def replace(self, service: str, text: str) -> str:
        """What a container has of its own, in terms of this machine."""
        text = interpolate(text)
        for name, port in (("redis", "6379"), ("api-1", "8011"), ("api-2", "8011")):
            text = text.replace(f"{name}:{port}", f"127.0.0.1:{self.ports[name]}")
        if service in ("api-1", "api-2"):  # its environment and its health check
            text = text.replace("127.0.0.1:8011", f"127.0.0.1:{self.ports[service]}")
            text = re.sub("^8011$", str(self.ports[service]), text)
            text = re.sub("^0.0.0.0$", "127.0.0.1", text)
            text = re.sub("^/files$", str(self.folder / "files"), text)
        if service == "proxy":
            text = text.replace("listen 8080", f"listen 127.0.0.1:{self.ports['proxy']}")
            text = text.replace("127.0.0.1:8080", f"127.0.0.1:{self.ports['proxy']}")
            text = text.replace(" /tmp/", f" {self.folder}/")
        return text

    def program(self, service: str, command: list[str]) -> list[str]:
        """A command of the file, with the addresses and folders that an image sets by itself."""
        command = [self.replace(service, word) for word in command]
        match command[0]:
            case "llmboost" if not shutil.which("llmboost", path=PATH):  # run from the sources
                return [sys.executable, "-P", "-m", *command]
            case "python":
                return [sys.executable, *command[1:]]
            case "redis-server":
                here = ["--port", str(self.ports["redis"]), "--bind", "127.0.0.1", "--dir", str(self.folder)]
                return [*command, *here]
            case "redis-cli":
                return [command[0], "-p", str(self.ports["redis"]), *command[1:]]
            case "nginx":
                config = self.folder / "nginx.conf"
                # The container has a user of its own; root's nginx would become one who can't write here.
                user = "user root;\n" if os.geteuid() == 0 else ""
                config.write_text(user + self.replace(service, (COMPOSE / "nginx.conf").read_text()))
                return [*command, "-c", str(config), "-p", str(self.folder)]
        return command

    def environment(self, service: str) -> dict[str, str]:
        given = self.services[service].get("environment", {})
        return {name: self.replace(service, value) for name, value in given.items()} | {"PATH": PATH}

    def start(self, service: str) -> None:
        """Starts a service after those that it waits for."""
        if service in self.running:
            return
        for other, condition in self.services[service].get("depends_on", {}).items():
            self.start(other)
            if condition["condition"] == "service_healthy":
                self.await_health(other)
        command = self.program(service, self.services[service]["command"])
        self.running[service] = Command(command, env=self.environment(service), cwd=self.folder)

    def healthy(self, service: str) -> bool:
        """The service's own health check."""
        running = self.running[service]
        assert running.process.poll() is None, f"{service} has ended:\n{running.log}"
        kind, *check = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        with Command(self.program(service, check), env=self.environment(service), cwd=self.folder) as command:
            return command.wait() == 0

    def await_health(self, service: str) -> None:
        wait_until(
            lambda: self.healthy(service), within=HEALTHY_WITHIN_S, every=0.5, what=f"{service} is healthy"
        )

    def stop(self, service: str) -> int:
        """Stops it with its signal, within its grace period."""
        spec = self.services[service]
        command = self.running.pop(service)
        with command:
            command.signal(signal.Signals[spec.get("stop_signal", "SIGTERM")])
            return command.wait(within=seconds(spec["stop_grace_period"]))

    def kill(self) -> None:
        for command in self.running.values():
            with command:
                pass


def seconds(duration: str) -> float:
    number, unit = duration[:-1], duration[-1]
    return float(number) * {"s": 1, "m": 60}[unit]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    if MISSING:
        reason = f"needs {', '.join(MISSING)} (Debian: redis-server, nginx-light, curl)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("compose")
    rehearsal = Rehearsal(folder)
    try:
        for service in rehearsal.services:
            rehearsal.start(service)
        for service in rehearsal.services:
            rehearsal.await_health(service)
        yield rehearsal
    finally:
        rehearsal.kill()


LONG_STORY: dict[str, Any] = {
    "model": "llmboost-demo",
    "messages": [{"role": "user", "content": "Write a short story about AI, in 100 words."}],
    "stream": True,
    "max_tokens": 120,
    "min_tokens": 120,
    "seed": 1,
}


def test_a_chat_through_the_proxy(rehearsal: Rehearsal) -> None:
    client = OpenAI(base_url=f"{rehearsal.url}/v1", api_key="-")
    stream = client.chat.completions.create(
        model="llmboost-demo",
        messages=[{"role": "user", "content": "Write a short story about AI, in 100 words."}],
        stream=True,
    )
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len("".join(chunk.choices[0].delta.content or "" for chunk in chunks).split()) > 10


def test_the_proxy_does_not_hold_tokens_back(rehearsal: Rehearsal) -> None:
    """The first token is here while the last is not yet made, and the others come one by one."""
    with httpx.Client(timeout=120) as client, Redis(port=rehearsal.ports["redis"]) as redis:

        def come_one_by_one() -> bool:
            with client.stream("POST", f"{rehearsal.url}/v1/chat/completions", json=LONG_STORY) as response:
                reads = response.iter_raw()
                first = next(reads)
                (stream,) = redis.keys("llmboost:stream:*" + stream_of(first) + "*")
                newest = redis.xinfo_stream(stream)["last-generated-id"]
                rest = list(reads)
            events = b"".join([first, *rest]).count(b"data: ")
            assert newest.startswith(b"1-"), f"{newest!r}: sealed before its first token came through"
            assert events > 100
            return len(rest) > events / 5

        # Tokens that wait together leave together, so on a busy machine there are fewer reads than events. A
        # proxy that holds them back does always.
        wait_until(come_one_by_one, within=60, what="an answer with a read for every five events")


def stream_of(first: bytes) -> str:
    data = next(line for line in first.decode().splitlines() if line.startswith("data: "))
    return str(json.loads(data.removeprefix("data: "))["id"])


def test_both_pods_and_both_workers_serve(rehearsal: Rehearsal) -> None:
    with httpx.Client(timeout=120) as client, Redis(port=rehearsal.ports["redis"]) as redis:
        assert client.get(f"{rehearsal.url}/ready").status_code == 200
        wait_until(
            lambda: redis.zcard("llmboost:workers") == 2, within=HEALTHY_WITHIN_S, what="both workers serve"
        )
        for pod in ("api-1", "api-2"):
            assert client.get(f"http://127.0.0.1:{rehearsal.ports[pod]}/ready").status_code == 200


def test_a_pod_that_is_gone_is_passed_over(rehearsal: Rehearsal) -> None:
    """A pod that drains refuses connections: no client sees that."""
    assert rehearsal.stop("api-1") == 0
    body = {**LONG_STORY, "stream": False, "max_tokens": 3, "min_tokens": 0}
    with httpx.Client(timeout=120) as client:
        for _ in range(4):
            response = client.post(f"{rehearsal.url}/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
    rehearsal.start("api-1")
    rehearsal.await_health("api-1")


def test_everything_stops_within_its_grace_period(rehearsal: Rehearsal) -> None:
    """In the order of `docker compose down`: whoever is depended on goes last."""
    for service in reversed([*rehearsal.running]):
        assert rehearsal.stop(service) == 0, service
