"""Picking up a job: time from enqueue to the start of its function, beside stock arq, on an idle system.

Both workers run in this process against one embedded server, with jobs that do nothing, one at a time.
Also counts the commands that the server executes per claim while 0, 100 and 1,000 jobs are running.

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

from arq.worker import Worker, func

from llmboost.connection import connect, deserialize, serialize
from llmboost.embedded import EmbeddedRedis
from llmboost.entries import Terminal
from llmboost.jobs import FUNCTION, GenerationJob, Prompt, SamplingParams, new_id, now
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_worker.leased import LeasedWorker

MODEL = "bench"


def job() -> GenerationJob:
    """A job that says nothing."""
    return GenerationJob(
        id=new_id("bench"),
        model=MODEL,
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
        task.cancel()
        await asyncio.gather(task, *worker.tasks.values(), return_exceptions=True)


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

        leased = LeasedWorker(
            queue,
            model=MODEL,
            owner="bench",
            lease=3.0,
            max_tries=3,
            max_jobs=32,
            redis_pool=redis,
            functions=[func(start, name=FUNCTION)],
            handle_signals=False,
        )
        async with running(leased):
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
        await redis.aclose()
    return {
        "pickup_ms": {"llmboost": _summary(ours), "arq": _summary(theirs)},
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 4),
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
