"""Many streams at once, over all pods, read to their ends whatever happens meanwhile."""

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import httpx
from redis.asyncio import Redis

from llmboost import keys
from llmboost.entries import Started
from llmboost.streams import TokenStreams, persist
from tests.e2e.system import MODEL
from tests.faults.fleet import Fleet
from tests.faults.oracle import Oracle
from tests.faults.reader import OfficialReader, Reader
from tests.faults.requests import request
from tests.waiting import wait_until

STREAMS = 56
ENDED_S = 150.0
"""Within which all have ended, or they hang. Far beyond what it takes, on a crowded machine too."""
BEGUN_S = 60.0

Held = dict[Reader, str]
"""Readers, each with the id of the worker that has its request."""


class Load:
    """`async with Load(fleet, oracle) as load:` has the streams running in its body, and holds each against
    the oracle when the body is left."""

    def __init__(
        self,
        fleet: Fleet,
        oracle: Oracle,
        *,
        ask: Callable[[int], dict[str, Any]] = request,
        streams: int = STREAMS,
        exact: bool = True,
        official: bool = False,
    ) -> None:
        """`ask`: the request of a number. `exact`: none may end in an error. `official`: some clients are
        OpenAI's own."""
        self._exact = exact
        self._official = official
        self.bodies = [ask(number) for number in range(streams)]
        self.readers: list[Reader] = []
        self.fleet = fleet
        self._oracle = oracle
        self._tasks: list[asyncio.Task[Reader]] = []

    async def __aenter__(self) -> "Load":
        await self._oracle.learn(self.fleet, self.bodies)
        self._redis: Redis = self.fleet.redis()
        self.streams: TokenStreams = self.fleet.streams(self._redis)
        # A stream may well be silent for longer than a client would wait by default.
        self.http = httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None))
        for number, body in enumerate(self.bodies):
            kind = OfficialReader if self._official and number % 7 == 0 else Reader
            self.readers.append(kind(body, self.urls, number))
        self._tasks = [asyncio.create_task(reader.read(self.http)) for reader in self.readers]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.ended()
            if error is None and self._exact:
                await self.check(self.readers)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.http.aclose()
            await self._redis.aclose()

    # Waiting

    async def accepted(self) -> None:
        """Every request is, and runs or waits or has ended."""

        async def all_accepted() -> bool:
            return await persist(lambda: self._redis.zcard(keys.OPEN)) >= len(self.running)

        await wait_until(all_accepted, within=BEGUN_S, every=0.05)

    async def begun(self, chunks: int = 5, *, streams: int = 0) -> None:
        """Every stream, or only so many, has so many more chunks than now, or has ended."""
        goals = [(reader, reader.begun + chunks) for reader in self.readers]
        wanted = streams or len(goals)

        def reached() -> bool:
            self._raise()
            return sum(reader.ended or reader.begun >= goal for reader, goal in goals) >= wanted

        await wait_until(reached, within=BEGUN_S)

    async def moved_on(self, held: Held) -> None:
        """Each of them has had a chunk since it went to another worker, or has ended."""
        moments: dict[Reader, float] = {}

        async def moved() -> bool:
            self._raise()
            for reader, worker in held.items():
                if reader not in moments and (await self.workers(reader))[-1] != worker:
                    moments[reader] = time.monotonic()
            return all(
                reader.ended or (reader in moments and reader.arrivals[-1] > moments[reader])
                for reader in held
            )

        await wait_until(moved, within=BEGUN_S, every=0.05)

    async def ended(self) -> None:
        """All have."""
        _, hung = await asyncio.wait(self._tasks, timeout=ENDED_S, return_when=asyncio.FIRST_EXCEPTION)
        self._raise()
        assert not hung, f"{len(hung)} streams hang: {[r.id for r in self.readers if not r.ended]}"

    def _raise(self) -> None:
        for task in self._tasks:
            if task.done():
                task.result()

    async def check(self, readers: list[Reader]) -> None:
        """Their streams, at their ends, are what they are without faults."""
        await self._oracle.check(readers, self.streams)

    # Looking on

    def urls(self) -> list[str]:
        """Of pods to ask."""
        return self.fleet.live_urls

    @property
    def running(self) -> list[Reader]:
        return [reader for reader in self.readers if not reader.ended]

    async def workers(self, reader: Reader) -> list[str]:
        """Ids of the workers that have had it, in order."""
        entries = await persist(lambda: self.streams.read(reader.id))
        return [entry.worker for _, entry in entries if isinstance(entry, Started)]

    async def held_by(self, name: str) -> Held:
        """The running ones whose tokens come from this part."""
        found = {}
        for reader in self.running:
            workers = await self.workers(reader) if reader.id else []
            if workers and self.fleet.name_of(workers[-1]) == name:
                found[reader] = workers[-1]
        return found

    async def busiest(self) -> tuple[str, Held]:
        """The worker with the most of them, which it has in the middle."""
        held = {name: await self.held_by(name) for name in self.fleet.worker_names}
        name = max(held, key=lambda name: len(held[name]))
        assert held[name], "all have ended already"
        return name, held[name]

    async def queued(self) -> list[str]:
        """Ids of requests that no worker has taken yet."""
        ids = await persist(lambda: self._redis.zrange(keys.queue(MODEL, "interactive"), 0, -1))
        return [job_id.decode() for job_id in ids]

    async def owner(self, reader: Reader) -> str:
        """Id of the worker that has claimed its request; empty if none has."""
        owner = await persist(lambda: self._redis.hmget(keys.claim(reader.id), ["owner"]))
        return (owner[0] or b"").decode()
