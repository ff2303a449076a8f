"""Picking up a job: time from enqueue to the start of its function, beside stock arq, on an idle system.

Both workers run in this process against one embedded server, with jobs that do nothing, one at a time.
Then interactive jobs on a worker that is full of batch jobs while 2,000 more of those are queued, in turn
with the same on a worker that has nothing to do. Also counts the commands that the server executes per claim
while 0, 100 and 1,000 jobs are running.

    python -m benchmarks.pickup [--jobs 200]
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from arq.connections import ArqRedis
from arq.worker import Worker, func
from tests.waiting import wait_until

from llmboost.connection import connect, deserialize, serialize
from llmboost.embedded import EmbeddedRedis
from llmboost.entries import Terminal
from llmboost.jobs import FUNCTION, GenerationJob, JobClass, OpaqueJob, Prompt, SamplingParams, new_id, now
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_worker.leased import LeasedWorker

MODEL = "bench"
CROWDED = "crowded"
"""A model whose queue has batch jobs in it."""
QUEUED = 2000
SLOTS = 32


def job(model: str = MODEL, job_class: JobClass = "interactive") -> GenerationJob:
    """A job that says nothing."""
    return GenerationJob(
        id=new_id("bench"),
        model=model,
        job_class=job_class,
        prompt=Prompt(text="hello"),
        sampling=SamplingParams(),
        created=now(),
        deadline=now() + 600,
    )


class Started:
    """The function that workers run: notes when it was started."""

    def __init__(self) -> None:
        self.at: asyncio.Future[float] | None = None

    async def __call__(self, ctx: dict[Any, Any], _: Any) -> None:
        """arq calls it with the job's one argument."""
        if self.at is not None and not self.at.done():
            self.at.set_result(time.perf_counter())


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[None]:
    """The worker, for as long as the block lasts."""
    task = asyncio.create_task(worker.main())
    try:
        yield
    finally:
        for each in (task, *worker.tasks.values()):
            each.cancel()
        await asyncio.gather(task, *worker.tasks.values(), return_exceptions=True)
        if isinstance(worker, LeasedWorker):
            await worker.wakes.aclose()


async def latencies(started: Started, enqueue: Callable[[], Awaitable[object]], jobs: int) -> list[float]:
    """Milliseconds from before the enqueue to the start of the function, job by job."""
    measured = []
    for _ in range(jobs):
        started.at = asyncio.get_running_loop().create_future()
        before = time.perf_counter()
        await enqueue()
        measured.append((await started.at - before) * 1000)
        await asyncio.sleep(0.01)  # let the worker go idle again
    return measured


async def beside_batch(redis: ArqRedis, queue: JobQueue, jobs: int) -> dict[str, list[float]]:
    """Latencies of interactive jobs where nothing else is, and where batch jobs have every slot and more of
    them wait."""
    started = Started()

    async def start(ctx: dict[Any, Any], argument: OpaqueJob) -> None:
        if argument.decode().job_class == "batch":
            await asyncio.Event().wait()
        await started(ctx, argument)

    for _ in range(SLOTS + QUEUED):
        await queue.submit(job(CROWDED, "batch"))
    idle, crowded = worker(redis, queue, start), worker(redis, queue, start, CROWDED)
    found: dict[str, list[float]] = {"idle": [], "crowded": []}
    async with running(idle), running(crowded):
        await wait_until(lambda: len(crowded.claims) == SLOTS)
        for _ in range(jobs):
            found["idle"] += await latencies(started, lambda: queue.submit(job()), 1)
            found["crowded"] += await latencies(started, lambda: queue.submit(job(CROWDED)), 1)
        assert await queue.depth(CROWDED, "batch") == QUEUED
    return found


def worker(
    redis: ArqRedis, queue: JobQueue, start: Callable[..., Awaitable[None]], model: str = MODEL
) -> LeasedWorker:
    """Runs the function for each job of a model."""
    return LeasedWorker(
        queue,
        model=model,
        owner=f"worker of {model}",
        lease=3600.0,
        max_tries=3,
        max_jobs=SLOTS,
        redis_pool=redis,
        functions=[func(start, name=FUNCTION)],
        handle_signals=False,
    )


async def commands_per_claim(queue: JobQueue, held: int) -> int:
    """Commands that the server executes for one claim while so many jobs run, the script's own included."""
    for _ in range(held):
        await queue.submit(job())
    claims = await queue.claim(MODEL, held, "holder", 60) if held else []
    last = job()
    await queue.submit(last)
    before = await _calls(queue)
    claims += await queue.claim(MODEL, 1, "holder", 60)
    cost = await _calls(queue) - before
    for claim in claims:
        await queue.streams.seal(claim.job_id, Terminal("bench"))
        await queue.finish(MODEL, claim, "holder")
    return cost


async def _calls(queue: JobQueue) -> int:
    stats = await queue.redis.info("commandstats")
    return sum(stat["calls"] for name, stat in stats.items() if not name.startswith("cmdstat_info"))


async def measure(jobs: int) -> dict[str, Any]:
    """Everything, as one JSON-able result."""
    with EmbeddedRedis() as server:
        redis = connect(server.url)
        queue = JobQueue(redis, TokenStreams(redis, 60))
        await commands_per_claim(queue, 0)  # the server learns the script
        commands = {held: await commands_per_claim(queue, held) for held in (0, 100, 1000)}
        started = Started()

        async def start(ctx: dict[Any, Any], argument: Any) -> None:
            await started(ctx, argument)

        async with running(worker(redis, queue, start)):
            ours = await latencies(started, lambda: queue.submit(job()), jobs)
        stock = Worker(
            functions=[func(start, name=FUNCTION)],
            queue_name="stock",
            redis_pool=redis,
            handle_signals=False,
            keep_result=0,
            job_serializer=serialize,
            job_deserializer=deserialize,
        )
        async with running(stock):
            theirs = await latencies(
                started,
                lambda: redis.enqueue_job(FUNCTION, b"hello", _queue_name="stock"),
                max(20, jobs // 10),
            )
        beside = await beside_batch(redis, queue, jobs)
        await redis.aclose()
    return {
        "pickup_ms": {"llmboost": _summary(ours), "arq": _summary(theirs)},
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 4),
        "interactive_pickup_ms": {where: _summary(values) for where, values in beside.items()},
        "ratio_of_crowded_to_idle": round(
            statistics.median(beside["crowded"]) / statistics.median(beside["idle"]), 2
        ),
        "commands_per_claim_by_running_jobs": commands,
    }


def _summary(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 3),
        "p99": round(ordered[int(len(ordered) * 0.99) - 1], 3),
        "n": len(ordered),
    }


def main() -> None:
    """Prints the result as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=200)
    print(json.dumps(asyncio.run(measure(parser.parse_args().jobs)), indent=2))


if __name__ == "__main__":
    main()
