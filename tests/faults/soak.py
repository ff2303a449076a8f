"""Random faults under load, for as long as one likes: `python -m tests.faults.soak --minutes 10`.

Clients keep a number of streams in flight; some break their connections and come back, some leave for good.
Meanwhile workers are killed, frozen and replaced, pods are killed and told to go, connections to Redis are
reset, and Redis is stopped and restarted. Every stream is held to what it is without faults. At the end a
table is printed, and the exit status is 0 only if nothing was lost, repeated, wrong, hung or left behind.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import httpx

from tests.faults import leaks
from tests.faults.fleet import Fleet
from tests.faults.oracle import Oracle
from tests.faults.reader import Reader
from tests.faults.requests import request

POOL = 48
"""Distinct requests."""
TOKENS = 60
HUNG_S = 120.0
"""Without a chunk, a stream hangs: far beyond what any fault, or many together, may cost."""
RESUMING, LEAVING = 0.15, 0.05
"""Shares of clients that break their connection in mid-stream and come back, or don't."""
LEASE_S = 3.0


class Hung(Exception):
    """Nothing came for too long."""


class Clients:
    """Keeps streams in flight, and keeps the score."""

    def __init__(self, fleet: Fleet, oracle: Oracle, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.problems: list[str] = []
        self.tokens = 0
        self.worst_gap = 0.0
        self.stopping = False
        self._fleet = fleet
        self._oracle = oracle
        self._seed = seed
        self._redis = fleet.redis()
        self._streams = fleet.streams(self._redis)

    async def run(self, count: int) -> None:
        """Until `stopping`, and then until the last has ended."""
        async with (
            httpx.AsyncClient(timeout=None, limits=httpx.Limits(max_connections=None)) as http,
            asyncio.TaskGroup() as group,
        ):
            for number in range(count):
                group.create_task(self._client(http, number))
        await self._redis.aclose()

    async def _client(self, http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        while not self.stopping:
            reader = Reader(request(chance.randrange(POOL), TOKENS), self._urls, chance.randrange(8))
            self.outcomes["streams"] += 1
            try:
                if await self._read(reader, http, chance):
                    await self._oracle.check([reader], self._streams)
                    self.tokens += self._oracle.tokens(reader.body)
                    self.outcomes["excused"] = self._oracle.ties
            except Hung as hung:
                self.outcomes["hung"] += 1
                self.problems.append(str(hung))
            except AssertionError as problem:
                kind = self._oracle.fault(reader)
                self.outcomes[kind] += 1
                self.problems.append(f"{kind}: {problem}")
            self.worst_gap = max(self.worst_gap, reader.worst_gap())

    async def _read(self, reader: Reader, http: httpx.AsyncClient, chance: random.Random) -> bool:
        """False if the client left for good."""
        fate = chance.random()
        if fate < RESUMING + LEAVING:
            wanted = chance.randrange(1, TOKENS // 2)
            await self._until(reader, http, lambda: reader.begun >= wanted)
            if fate < LEAVING:
                self.outcomes["left for good"] += 1
                return False
            self.outcomes["broke off and came back"] += 1
            await asyncio.sleep(chance.uniform(0, 1))  # away, for well less than the grace period
        await self._until(reader, http, lambda: False)
        self.outcomes["resumed"] += reader.resumed
        return True

    async def _until(self, reader: Reader, http: httpx.AsyncClient, enough: Callable[[], bool]) -> None:
        """Reads to the end, or until it is enough, and then closes the connection."""
        task = asyncio.create_task(reader.read(http))
        begun = time.monotonic()
        try:
            while not task.done() and not enough():
                await asyncio.wait([task], timeout=0.5)
                if time.monotonic() - max([begun, *reader.arrivals[-1:]]) > HUNG_S:
                    raise Hung(f"{reader.id} hangs after {reader.begun} chunks: {reader.body}")
        finally:
            task.cancel()
            await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    def _urls(self) -> list[str]:
        return self._fleet.live_urls


class Faults:
    """What happens to the fleet."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._fleet = fleet
        self._random = random.Random(seed)
        self._kinds: dict[str, Callable[[], Awaitable[bool]]] = {
            "worker killed": self._kill_worker,
            "worker frozen": self._freeze_worker,
            "worker replaced": self._replace_worker,
            "pod killed": self._kill_pod,
            "pod replaced": self._replace_pod,
            "connections to Redis reset": self._reset,
            "replies of Redis lost": self._lose_replies,
            "Redis frozen": self._freeze_redis,
            "Redis restarted": self._restart_redis,
        }

    async def run(self, until: float) -> None:
        """One fault every few seconds."""
        while (left := until - time.monotonic()) > 0:
            await self._pass(1, min(left, 5))
            name = self._random.choice(list(self._kinds))
            if await self._kinds[name]():
                self.counts[name] += 1
                print(f"{datetime.now(UTC):%H:%M:%S.%f} {name}", file=sys.stderr)

    async def _pass(self, least: float, most: float) -> None:
        """Time passes: a fault lasts, or there is none."""
        await asyncio.sleep(self._random.uniform(least, most))

    # Each returns False if the fleet can't bear it now: a worker and a pod are always left to go on.

    def _spare_worker(self) -> str | None:
        names = self._fleet.serving("worker")
        return self._random.choice(names) if len(names) > 1 else None

    def _spare_pod(self) -> str | None:
        names = self._fleet.serving("pod")
        return self._random.choice(names) if len(names) > 1 else None

    async def _kill_worker(self) -> bool:
        if (name := self._spare_worker()) is None:
            return False
        self._fleet.kill(name)
        self._fleet.add_worker()
        return True

    async def _freeze_worker(self) -> bool:
        if (name := self._spare_worker()) is None:
            return False
        self._fleet.freeze(name)
        await self._pass(0.1 * LEASE_S, 1.5 * LEASE_S)
        self._fleet.thaw(name)
        return True

    async def _replace_worker(self) -> bool:
        if (name := self._spare_worker()) is None:
            return False
        self._fleet.add_worker()
        self._fleet.tell_to_go(name)
        return True

    async def _kill_pod(self) -> bool:
        if (name := self._spare_pod()) is None:
            return False
        self._fleet.kill(name)
        self._fleet.add_pod(name)
        return True

    async def _replace_pod(self) -> bool:
        if (name := self._spare_pod()) is None:
            return False
        self._fleet.tell_to_go(name)
        self._fleet.add_pod(name)
        return True

    async def _reset(self) -> bool:
        self._fleet.network.reset()
        return True

    async def _lose_replies(self) -> bool:
        self._fleet.network.lose_replies(0.02, self._random.randrange(2**32))
        await self._pass(0.5, 3)
        self._fleet.network.heal()
        return True

    async def _freeze_redis(self) -> bool:
        self._fleet.redis_server.freeze()
        await self._pass(0.5, 3)
        self._fleet.redis_server.thaw()
        return True

    async def _restart_redis(self) -> bool:
        self._fleet.redis_server.kill()
        await self._pass(0, 1)
        self._fleet.redis_server.spawn()
        await asyncio.to_thread(self._fleet.redis_server.await_started)
        return True


async def soak(minutes: float, streams: int, seed: int, folder: Path) -> bool:
    """Whether all was well; prints what happened."""
    # The settings are the default ones, but for three: streams needn't be kept for long after they have been
    # looked at; a pod that goes does not wait for all of its streams; and where workers, pods and 200 clients
    # share two cores, a pod takes seconds to start. With the default grace, two pods killed within four
    # seconds left nobody to read some streams in time, which were then ended as they should be.
    flags = ("--retention", "60", "--grace", "15")
    oracle = Oracle()
    with Fleet(folder, workers=3, worker_flags=flags, pod_flags=(*flags, "--drain-timeout", "5")) as fleet:
        await fleet.ready()
        await oracle.learn(fleet, [request(number, TOKENS) for number in range(POOL)])
        clients, faults = Clients(fleet, oracle, seed), Faults(fleet, seed)
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            group.create_task(clients.run(streams))
            await faults.run(begun + minutes * 60)
            clients.stopping = True
            fleet.mend()
        seconds = time.monotonic() - begun
        await fleet.ready()
        left = ""
        try:
            async with fleet.redis() as redis:
                await leaks.check(redis)
        except AssertionError as leak:
            left = str(leak)
    print(table(clients, faults, seconds, streams, seed))
    for problem in [*clients.problems, *filter(None, [left])]:
        print(problem, file=sys.stderr)
    well = not clients.problems and not left
    if not well:
        for name, lines in fleet.tracebacks():
            print(f"--- {name}", *lines, sep="\n", file=sys.stderr)
    return well


def table(clients: Clients, faults: Faults, seconds: float, streams: int, seed: int) -> str:
    """What happened, in Markdown."""
    outcomes = clients.outcomes
    must_be_none = {name: outcomes.pop(name, 0) for name in ("lost", "repeated", "wrong", "hung")}
    rows = [
        (f"streams, {streams} in flight for {seconds:.0f} s (seed {seed})", outcomes.pop("streams", 0)),
        ("tokens, of streams that were read to their end", clients.tokens),
        *sorted(faults.counts.items()),
        ("clients that left for good", outcomes.pop("left for good", 0)),
        ("clients that broke off and came back", outcomes.pop("broke off and came back", 0)),
        ("connections on which a stream was resumed", outcomes.pop("resumed", 0)),
        ("differences excused as numerical ties", outcomes.pop("excused", 0)),
        *must_be_none.items(),
        ("gave up after their tries", outcomes.pop("tries_used_up", 0)),
        *((f"ended in `{name}`", count) for name, count in sorted(outcomes.items())),
        ("worst gap between two tokens, s", f"{clients.worst_gap:.1f}"),
    ]
    return "\n".join(["| | |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=200, help="in flight")
    parser.add_argument("--seed", type=int, default=random.randrange(1000), help="of faults and clients")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        well = asyncio.run(soak(asked.minutes, asked.streams, asked.seed, Path(folder)))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
