"""What a worker that is told to go does with its jobs."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.jobs import JOB_CLASSES, GenerationJob
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_worker import checks
from tests.integration.deaths import is_suspect
from tests.integration.workers import (
    StartWorker,
    running,
    step_until,
    submit,
    transcript,
)
from tests.jobs import MODEL
from tests.waiting import wait_until


async def waiting(redis: ArqRedis) -> int:
    """Jobs in the queue; with no lease left on any of them."""
    assert await redis.zcard(keys.leases(MODEL)) == 0
    return int(await redis.zcard(keys.queue(MODEL, "interactive")))


async def test_a_worker_that_is_told_to_go_hands_over_before_all_else(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All jobs at once, while the engine is still in the middle of a step; none at the cost of a try."""
    worker = await start_worker()
    jobs = [await submit(queue) for _ in range(6)]
    await running(worker, 6)
    step_over = threading.Event()
    close = worker.engine.close

    def close_after_the_step() -> None:
        step_over.wait(60)
        close()

    worker.engine.close = close_after_the_step  # type: ignore[method-assign]
    release = worker.process.queue.release
    released: list[int] = []

    async def counted(owner: str, claims: Sequence[Claim]) -> list[str]:
        released.append(len(claims))
        return await release(owner, claims)

    monkeypatch.setattr(worker.process.queue, "release", counted)
    terminating = asyncio.create_task(worker.terminate())
    await wait_until(lambda: _all_wait(redis, 6))
    assert not terminating.done()
    step_over.set()
    await terminating
    assert released == [6]
    for job in jobs:
        assert not await redis.hexists(keys.claim(job.id), "deaths")
        assert not await is_suspect(redis, job)


async def _all_wait(redis: ArqRedis, count: int) -> bool:
    return (await redis.zcard(keys.queue(MODEL, "interactive")), await redis.zcard(keys.leases(MODEL))) == (
        count,
        0,
    )


async def test_jobs_of_a_claim_under_way_are_handed_over_too(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has given the jobs away, but the reply is not here yet when the signal comes."""
    worker = await start_worker()
    claimed, reply = asyncio.Event(), asyncio.Event()
    claim = worker.process.queue.claim

    async def slow_claim(*arguments: Any) -> Any:
        claims = await claim(*arguments)
        if claims:
            claimed.set()
            await reply.wait()
        return claims

    await wait_until(lambda: _waits_for_work(redis))
    monkeypatch.setattr(worker.process.queue, "claim", slow_claim)
    await submit(queue)
    await asyncio.wait_for(claimed.wait(), 10)
    terminating = asyncio.create_task(worker.terminate())
    reply.set()
    await terminating
    assert await waiting(redis) == 1


async def _waits_for_work(redis: ArqRedis) -> bool:
    return (await redis.info("clients"))["blocked_clients"] == len(JOB_CLASSES)


async def test_a_prompt_that_is_being_encoded_goes_to_the_next_worker(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    redis: ArqRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long one is encoded in a thread, which nobody can stop; what it yields is dropped."""
    encoding, encoded = threading.Event(), threading.Event()
    encode = checks.encode_prompt

    def slow_encode(*arguments: Any) -> list[int]:
        encoding.set()
        encoded.wait(60)
        return encode(*arguments)

    monkeypatch.setattr(checks, "encode_prompt", slow_encode)
    monkeypatch.setattr(checks, "LONG_TEXT", 0)
    worker = await start_worker()
    job = await submit(queue)
    await wait_until(encoding.is_set)
    await worker.terminate()
    encoded.set()
    assert await waiting(redis) == 1
    assert (await transcript(streams, job)).terminal is None
    second = await start_worker()
    await running(second)


async def test_a_job_that_ends_as_its_worker_goes_is_not_run_again(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    """It may have been handed over before its seal: the next worker finds the seal and clears it away."""
    worker = await start_worker()
    job = await submit(queue, max_tokens=1)
    await running(worker)
    worker.engine.step()
    await worker.terminate()
    second = await start_worker()
    await step_until(second, lambda: _sealed(streams, job))
    await wait_until(lambda: _cleared(redis, job))
    log = await transcript(streams, job)
    assert (len(log.choices[0].token_ids), log.terminal is not None) == (1, True)


async def _sealed(streams: TokenStreams, job: GenerationJob) -> bool:
    return (await transcript(streams, job)).terminal is not None


async def _cleared(redis: ArqRedis, job: GenerationJob) -> bool:
    return not await redis.exists(keys.claim(job.id), keys.arq_job(job.id), keys.arq_retry(job.id))


async def test_a_worker_goes_even_if_redis_does_not_answer(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis
) -> None:
    """Its jobs go to others when their leases lapse."""
    worker = await start_worker()
    await submit(queue)
    await running(worker)
    async with frozen(redis):
        await asyncio.wait_for(worker.terminate(), 20)
    await start_worker()
    await wait_until(lambda: _attempt(queue, 2))


async def _attempt(queue: JobQueue, attempt: int) -> bool:
    [claim] = await queue.redis.keys(keys.claim("*"))
    return int(await queue.redis.hget(claim, "attempt")) == attempt


@asynccontextmanager
async def frozen(redis: ArqRedis) -> AsyncIterator[None]:
    """The server answers nobody."""
    server = (await redis.info("server"))["process_id"]
    os.kill(server, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server, signal.SIGCONT)
