"""How many entries a worker makes of its tokens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from llmboost.entries import Delta, Terminal
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_worker.generation import GaveWay
from tests.engines import ScriptedEngine
from tests.integration.generators import SteppedGenerator
from tests.jobs import make_job
from tests.waiting import wait_until


class Running:
    """Requests in the hands of one worker, whose engine steps when it is told to."""

    def __init__(self, queue: JobQueue, streams: TokenStreams, interval: int) -> None:
        self.generator = SteppedGenerator(streams, ScriptedEngine([70]), interval)
        self.jobs: list[str] = []
        self._queue = queue
        self._streams = streams

    async def begin(self, **fields: Any) -> "tuple[str, asyncio.Task[None]]":
        job = make_job(needs_audience=False, **fields)
        await self._queue.submit(job)
        self.jobs.append(job.id)
        return job.id, await self.generator.begin(job)

    async def step(self) -> None:
        """One step, and whatever is sent of it."""
        self.generator.engine.step()
        await wait_until(lambda: self._is_sent)

    @property
    def _is_sent(self) -> bool:
        in_flight = [generation.outbox.in_flight for generation in self.generator.running.values()]
        return not (any(in_flight) or self.generator.publisher._work.is_set())

    async def entries(self, job_id: str) -> list[int]:
        """Tokens in each."""
        log = [entry for _, entry in await self._streams.read(job_id)]
        return [len(entry.choices) for entry in log if isinstance(entry, Delta)]


Start = Callable[[int], Awaitable[Running]]


@pytest.fixture
async def start(queue: JobQueue, streams: TokenStreams) -> AsyncIterator[Start]:
    all_running: list[Running] = []
    sending: list[asyncio.Task[None]] = []

    async def started(interval: int) -> Running:
        running = Running(queue, streams, interval)
        all_running.append(running)
        sending.append(asyncio.create_task(running.generator.publisher.run()))
        return running

    yield started
    for task in sending:
        task.cancel()
    for job_id in [job_id for running in all_running for job_id in running.jobs]:
        await queue.cancel(job_id, Terminal("test"))
        await queue.discard(job_id)


@pytest.mark.parametrize(
    ("interval", "entries"), [(1, [1] * 8), (2, [1, 2, 2, 2, 1]), (3, [1, 3, 3, 1]), (100, [1, 7])]
)
async def test_only_the_first_and_the_last_token_never_wait(
    start: Start, interval: int, entries: list[int]
) -> None:
    running = await start(interval)
    job_id, attempt = await running.begin(max_tokens=8)
    for _ in range(8):
        await running.step()
    await attempt
    assert await running.entries(job_id) == entries


async def test_requests_keep_in_step(start: Start) -> None:
    """One that began later is appended with the others: a command a step would save nothing."""
    running = await start(3)
    early, first = await running.begin(max_tokens=9)
    await running.step()
    await running.step()
    late, second = await running.begin(max_tokens=7)
    for _ in range(7):
        await running.step()
    await asyncio.gather(first, second)
    # The late one's first token takes along what the early one has.
    assert await running.entries(early) == [1, 2, 3, 3]
    assert await running.entries(late) == [1, 3, 3]


async def test_what_gives_way_is_not_kept(start: Start) -> None:
    running = await start(100)
    job_id, attempt = await running.begin(max_tokens=50, job_class="batch")
    for _ in range(5):
        await running.step()
    running.generator.running[job_id].give_way()
    with pytest.raises(GaveWay):
        await asyncio.wait_for(attempt, 10)
    assert await running.entries(job_id) == [1, 4]
