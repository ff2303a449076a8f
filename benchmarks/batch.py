"""A batch's cost to the pod that runs it: memory, lines a second, and what the streams beside it feel.

A process with a pod's parts and its batch runner alone runs a batch of 1,000 lines, another one of 100,000. A
worker in a process of its own answers every line at once, with one token. "Late" is by how much a timer of
10 ms in the pod's event loop fires too late: so long does a stream's token wait there.

    python -m benchmarks.batch [--lines 1000 100000]
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from array import array
from collections.abc import AsyncIterator

import psutil

from llmboost.connection import connect, deserialize
from llmboost.embedded import EmbeddedRedis
from llmboost.entries import ChoiceDelta, Delta, Terminal, Usage
from llmboost.jobs import new_id, now
from llmboost.keys import arq_job
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from llmboost.registry import ModelCard, Registry, WorkerCard
from llmboost.settings import ApiSettings
from llmboost.streams import TokenStreams, Writer
from llmboost_api.batches.record import ENDED, ID_PREFIX, BatchRecord
from llmboost_api.batches.runner import BatchRunner
from llmboost_api.batches.store import BatchStore
from llmboost_api.pod import Pod

MODEL, WORKER = "bench", "worker-1"
CHAT = "/v1/chat/completions"
PROMPT = "Tell me a story. " * 20
TICK_S = 0.01


# The worker


async def work(redis_url: str) -> None:
    """Answers every job at once, until it is killed."""
    redis = connect(redis_url)
    queue = JobQueue(redis, TokenStreams(redis, retention=600))
    card = WorkerCard(WORKER, MODEL, "none", "none", 256, 0, 0)
    while True:
        await Registry(redis).announce(card, [ModelCard(MODEL, MODEL, 1000, 0)], ttl=60)
        await queue.wait(MODEL)
        while claims := await queue.claim(MODEL, 64, WORKER, lease=3600):
            await asyncio.gather(*(answer(queue, claim) for claim in claims))


async def answer(queue: JobQueue, claim: Claim) -> None:
    """One job, as a worker answers it."""
    job = deserialize(await queue.redis.get(arq_job(claim.job_id)))["a"][0].decode()
    writer = Writer(job.id, claim.attempt)
    await queue.streams.begin(writer, WORKER)
    answer = Delta([ChoiceDelta(0, 0, [1], "Hello.", "stop")])
    await queue.streams.append([(job.id, writer.next_id(), answer)])
    await queue.streams.seal(job.id, Terminal(WORKER, Usage(100, 1)), writer)
    await queue.finish(MODEL, claim, WORKER)


def run_worker(redis_url: str) -> None:
    asyncio.run(work(redis_url))


# The pod


class Lateness:
    """Of a timer in this loop, as far as the loop itself is to blame, and not others on the machine."""

    def __init__(self) -> None:
        self.seconds = array("d")

    async def measure(self) -> None:
        while True:
            due, computed = time.perf_counter() + TICK_S, time.thread_time()
            await asyncio.sleep(TICK_S)
            self.seconds.append(min(time.perf_counter() - due, time.thread_time() - computed))

    def at(self, part: float) -> float:
        """The quantile, in ms."""
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(part * len(ordered)))]


async def content(lines: int) -> AsyncIterator[bytes]:
    """The input, in pieces."""
    messages = [{"role": "user", "content": PROMPT}]
    for number in range(lines):
        body = {"model": MODEL, "messages": messages, "max_tokens": 10}
        envelope = {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}
        yield json.dumps(envelope).encode() + b"\n"


async def run_batch(settings: ApiSettings, lines: int) -> dict[str, float]:
    """One batch from its upload to its end."""
    process = psutil.Process()
    async with Pod(settings) as pod, BatchRunner(pod) as runner:
        while not await pod.registry.models():  # noqa: ASYNC110  (the worker is starting)
            await asyncio.sleep(0.05)
        file = await pod.files.create("", "input.jsonl", "batch", content(lines))
        begun, before, peak = time.perf_counter(), process.memory_info().rss, 0
        record = BatchRecord(
            id=new_id(ID_PREFIX),
            owner="",
            input_file_id=file.id,
            endpoint=CHAT,
            completion_window="24h",
            created=now(),
            deadline=now() + 86400,
            output_life=3600,
        )
        lateness = Lateness()
        timer = asyncio.create_task(lateness.measure())
        await BatchStore(pod.redis, pod.settings.response_ttl).create(record, None)
        runner.wake()
        validated = 0.0
        while True:
            batch = await BatchStore(pod.redis, pod.settings.response_ttl).get(record.id)
            assert batch is not None
            peak = max(peak, process.memory_info().rss)
            if batch.progress.total and not validated:
                validated = time.perf_counter() - begun
            if batch.progress.status in ENDED:
                break
            await asyncio.sleep(0.02)
        seconds = time.perf_counter() - begun
        timer.cancel()
        assert (batch.progress.status, batch.progress.completed) == ("completed", lines), batch
        return {
            "lines": lines,
            "seconds": seconds,
            "validation_seconds": validated,
            "lines_per_second": lines / seconds,
            "rss_before_mib": before / 2**20,
            "rss_grown_mib": (peak - before) / 2**20,
            "late_p50_ms": lateness.at(0.5),
            "late_p99_ms": lateness.at(0.99),
            "late_worst_ms": lateness.at(1),
        }


def run_pod(redis_url: str, folder: str, lines: int) -> None:
    settings = ApiSettings(redis_url=redis_url, files_url=folder)
    result = asyncio.run(run_batch(settings, lines))
    print(json.dumps({name: round(value, 2) for name, value in result.items()}), flush=True)


def main() -> None:
    """Runs both, prints a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs="+", default=[1_000, 100_000])
    counts = parser.parse_args().lines
    spawn = multiprocessing.get_context("spawn")
    with EmbeddedRedis() as redis, tempfile.TemporaryDirectory() as folder:
        worker = spawn.Process(target=run_worker, args=(redis.url,), daemon=True)
        worker.start()
        for lines in counts:
            pod = spawn.Process(target=run_pod, args=(redis.url, os.path.join(folder, "files"), lines))
            pod.start()
            pod.join()
        with contextlib.suppress(ProcessLookupError):
            worker.kill()


if __name__ == "__main__":
    main()
