"""Pods and workers of which any may be killed, frozen, told to go and replaced, behind a network and on a
Redis that may fail too."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
from redis.asyncio import Redis

from llmboost.connection import connect
from llmboost.embedded import free_port
from llmboost.streams import TokenStreams
from tests.commands import Command
from tests.e2e.system import ONE_THREAD, System
from tests.faults.crowding import Crowding
from tests.faults.network import Network
from tests.faults.redis_server import RedisServer
from tests.waiting import wait_until

EXITED_S = 60.0
READY_S = 60.0


class Fleet(System):
    """Pods keep their ports when they are replaced; workers get new names, for they are new ones.

    Everything is to be started from the main thread: on Linux a child that dies with its parent dies with
    the thread that started it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        pods: int = 2,
        worker_flags: tuple[str, ...] = (),
        pod_flags: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.redis_server = RedisServer(folder / "redis")
        self.pods = [f"pod-{number}" for number in range(pods)]
        self.workers_wanted = workers
        self._worker_flags = worker_flags
        self._pod_flags = pod_flags
        self._workers_started = 0
        self._ever: list[tuple[str, Command]] = []
        self._frozen: set[str] = set()

    def __enter__(self) -> "Fleet":
        super().__enter__()
        self.urls = [f"http://127.0.0.1:{free_port()}" for _ in self.pods]
        self.mend()
        return self

    def _open_redis(self) -> str:
        self._stack.enter_context(self.redis_server)
        self.network = self._stack.enter_context(Network(self.redis_server.port))
        return f"redis://127.0.0.1:{self.network.port}/0"

    # Faults of one part, by name

    def kill(self, name: str) -> Command:
        """SIGKILL; its log stays in the report of a failing test."""
        command = self.parts.pop(name)
        self._frozen.discard(name)
        command.signal(signal.SIGKILL)
        command.wait()
        return command

    def freeze(self, name: str) -> None:
        self.parts[name].signal(signal.SIGSTOP)
        self._frozen.add(name)

    def thaw(self, name: str) -> None:
        self.parts[name].signal(signal.SIGCONT)
        self._frozen.discard(name)

    def tell_to_go(self, name: str) -> Command:
        """SIGTERM; it is no longer one of the parts."""
        command = self.parts.pop(name)
        command.signal(signal.SIGTERM)
        return command

    def _start(self, name: str, *arguments: str) -> Command:
        command = super()._start(name, *arguments)
        self._ever.append((name, command))
        return command

    def tracebacks(self) -> list[tuple[str, list[str]]]:
        """The last lines of every process, gone ones too, that logged a traceback."""
        return [
            (name, command.err[-100:])
            for name, command in self._ever
            if any(line.startswith("Traceback") for line in command.err)
        ]

    # Parts

    @property
    def worker_names(self) -> list[str]:
        """Those that run, loading ones and frozen ones too; the oldest first."""
        return [name for name in self.parts if name.startswith("worker-")]

    def serving(self, kind: str) -> list[str]:
        """Names of the workers, or pods, that do what they are there for: not loading, not frozen."""
        line = {"worker": ": serving ", "pod": "ready: serving on"}[kind]
        return [
            name
            for name, part in self.parts.items()
            if name.startswith(f"{kind}-")
            and name not in self._frozen
            and part.process.poll() is None
            and any(line in each for each in part.err)
        ]

    @property
    def live_urls(self) -> list[str]:
        """Of pods that run."""
        return [url for name, url in zip(self.pods, self.urls, strict=True) if name in self.parts]

    def add_worker(self, *flags: str) -> str:
        """Starts one; `await_worker` waits until it serves."""
        self._workers_started += 1
        name = f"worker-{self._workers_started}"
        self.start_worker(*ONE_THREAD, *self._worker_flags, *flags, name=name)
        return name

    def add_pod(self, name: str, *flags: str) -> None:
        """Starts one where its predecessor of that name listened; `ready` waits until it serves."""
        port = self.urls[self.pods.index(name)].rpartition(":")[2]
        self._start(name, "api", "--port", port, *self._pod_flags, *flags)

    def mend(self) -> None:
        """Takes back every fault and replaces what is missing; waits for nothing but Redis."""
        self.network.heal()
        if self.redis_server.running:
            self.redis_server.thaw()
        else:
            self.redis_server.start()
        for name in list(self._frozen):
            self.thaw(name)
        for name in [name for name, part in self.parts.items() if part.process.poll() is not None]:
            del self.parts[name]
        for _ in range(self.workers_wanted - len(self.worker_names)):
            self.add_worker()
        for name in self.pods:
            if name not in self.parts:
                self.add_pod(name)

    async def ready(self) -> None:
        """Waits until every pod serves and sees as many workers as there are."""
        for name in self.worker_names:
            await asyncio.to_thread(self.await_worker, name)

        async def all_seen(url: str) -> bool:
            try:
                report = (await http.get(f"{url}/ready")).json()
            except httpx.HTTPError:
                return False
            return len(report.get("workers", [])) == len(self.worker_names)

        async with httpx.AsyncClient(timeout=5) as http:
            for url in self.live_urls:
                await wait_until(lambda url=url: all_seen(url), within=READY_S, every=0.05)

    def crowding(self) -> Crowding:
        """Of all that a token goes through on its way, and of this process, which reads it."""
        return Crowding(
            [os.getpid(), self.redis_server.pid, *(part.process.pid for part in self.parts.values())]
        )

    def name_of(self, worker_id: str) -> str:
        """The part that goes by this id in the streams, `<host>-<pid>-<random>`; empty if it has gone."""
        pid = int(worker_id.rsplit("-", 2)[1])
        return next((name for name, part in self.parts.items() if part.process.pid == pid), "")

    # Looking on

    async def idle(self, name: str) -> None:
        """Waits until a worker reports that its engine has nothing to do."""
        pid = f"-{self.parts[name].process.pid}-"

        async def reported() -> bool:
            async with httpx.AsyncClient(timeout=5) as http:
                report = (await http.get(f"{self.live_urls[0]}/ready")).json()
            return any(
                pid in worker["worker"] and worker["running"] + worker["waiting"] == 0
                for worker in report.get("workers", [])
            )

        await wait_until(reported, within=READY_S, every=0.05)

    # Past the network

    def redis(self) -> Redis:
        return connect(self.redis_server.url)

    def streams(self, redis: Redis) -> TokenStreams:
        return TokenStreams(redis, retention=600)


async def exit_of(command: Command) -> tuple[int, float]:
    """Waits until a part that was told to go has ended; its exit code, and the seconds that it took from now,
    without those in which others had the cores that it wanted."""
    begun, crowding = time.monotonic(), Crowding([command.process.pid])
    while command.process.poll() is None and time.monotonic() - begun < EXITED_S:
        crowding.look()
        await asyncio.sleep(0.005)  # crowding is seen by looking often
    seconds = time.monotonic() - begun
    return await asyncio.to_thread(command.wait, 1), seconds - crowding.look()
