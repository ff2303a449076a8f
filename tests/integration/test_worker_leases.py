"""What a worker does with its leases: keeps them, loses them, and takes others'."""

import asyncio
from typing import Any

import pytest
from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost import keys
from llmboost.jobs import GenerationJob
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_worker import leased
from llmboost_worker.text import Tokenizer
from tests.integration.deaths import begin, die, is_suspect, none_on_probation
from tests.integration.workers import (
    LEASE_S,
    RunningWorker,
    StartWorker,
    emitted,
    ended,
    expected_ids,
    registered,
    running,
    step_until,
    submit,
    transcript,
)
from tests.jobs import MODEL
from tests.waiting import wait_until

# Claiming


async def test_a_worker_takes_a_burst_in_small_bites(
    start_worker: StartWorker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that another idle one gets its share. Alone it asks for more at once, until it has them all."""
    jobs = [await submit(queue) for _ in range(20)]
    calls: list[tuple[str, int]] = []
    claim, wait = JobQueue.claim, JobQueue.wait

    async def noted_claim(*arguments: Any) -> list[Claim]:
        claims = await claim(*arguments)
        calls.append(("claim", len(claims)))
        return claims

    async def noted_wait(*arguments: Any) -> bool:
        calls.append(("wait", 0))
        return await wait(*arguments)

    monkeypatch.setattr(JobQueue, "claim", noted_claim)
    monkeypatch.setattr(JobQueue, "wait", noted_wait)
    worker = await start_worker(slots=32)
    await running(worker, len(jobs))
    assert calls[:2] == [("claim", leased.FIRST_BITE), ("claim", len(jobs) - leased.FIRST_BITE)]


# Acquittal and probation


async def test_an_attempt_that_goes_on_producing_is_acquitted(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    redis: ArqRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that has produced a token and then hangs is not."""
    monkeypatch.setattr(leased, "ACQUITTED_AFTER_S", 0.05)
    worker = await start_worker()
    job = await submit(queue, max_tokens=900)
    await running(worker)
    await step_until(worker, lambda: emitted(streams, job, 1))
    await worker.process.arq.renew()
    assert await is_suspect(redis, job)
    await step_until(worker, lambda: _acquitted(redis, job))


async def _acquitted(redis: ArqRedis, job: GenerationJob) -> bool:
    return not await is_suspect(redis, job)


async def on_last_try(queue: JobQueue) -> list[GenerationJob]:
    """Two jobs whose workers have died twice, each time with both."""
    jobs = [await submit(queue, max_tokens=900) for _ in range(2)]
    for _ in range(2):
        claims = await queue.claim(MODEL, 8, "dead", LEASE_S)
        await begin(queue, claims)
        await die(queue, claims)
    return jobs


async def test_the_next_on_its_last_try_comes_when_the_first_is_acquitted(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    redis: ArqRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its first token does not clear it: it may kill later."""
    monkeypatch.setattr(leased, "ACQUITTED_AFTER_S", 0.05)
    first, second = await on_last_try(queue)
    worker = await start_worker()
    await running(worker, 1)
    assert await redis.get(keys.probation(worker.process.id)) == first.id.encode()
    await step_until(worker, lambda: emitted(streams, first, 1))
    assert await redis.exists(keys.probation(worker.process.id))
    await step_until(worker, lambda: len(worker.engine.sequences) == 2)
    assert not await is_suspect(redis, first)
    assert await is_suspect(redis, second)


async def test_a_probation_ends_with_its_job(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    first, _ = await on_last_try(queue)
    worker = await start_worker()
    await running(worker, 1)
    worker.engine.failing = set(worker.engine.sequences)
    worker.engine.step()
    await ended(streams, first)
    await running(worker, 1)
    await worker.terminate()
    await wait_until(lambda: none_on_probation(redis))


# Losing and keeping


async def test_a_worker_that_gets_back_the_job_it_has_lost_runs_it_once(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis, tokenizer: Tokenizer
) -> None:
    """It was starved for longer than its lease, and then claims before it has noticed. The earlier attempt's
    end must not be taken for the later one's."""
    worker = await start_worker()
    job = await submit(queue)
    await running(worker)
    await step_until(worker, lambda: emitted(streams, job, 3))
    earlier = worker.process.arq.claims[job.id]
    await queue.release(worker.process.id, [earlier])
    await wait_until(lambda: worker.process.arq.claims[job.id].attempt == 2)
    await wait_until(lambda: [s for s in worker.engine.sequences if "#2." in s])
    assert len(worker.engine.sequences) == 1
    assert await redis.zscore(keys.leases(MODEL), job.id) is not None
    await step_until(worker, lambda: not worker.engine.sequences)
    assert (await ended(streams, job)).error is None
    assert (await transcript(streams, job)).choices[0].token_ids == expected_ids(job, worker, tokenizer, 12)


async def test_a_job_that_is_back_before_its_loss_is_known_is_not_dropped(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal's reply says that the earlier claim is lost, when the worker has claimed the job again."""
    worker = await start_worker()
    job = await submit(queue)
    await running(worker)
    arq, renew = worker.process.arq, queue.renew

    async def slow_renew(*arguments: Any) -> list[str]:
        monkeypatch.setattr(worker.process.queue, "renew", renew)  # the heartbeat's
        await queue.release(arq.owner, [arq.claims[job.id]])
        lost = await renew(*arguments)
        await wait_until(lambda: arq.claims[job.id].attempt == 2)
        assert lost == [job.id]
        return lost

    monkeypatch.setattr(worker.process.queue, "renew", slow_renew)
    await arq.renew()
    assert arq.claims[job.id].attempt == 2
    await wait_until(lambda: [s for s in worker.engine.sequences if "#2." in s])


async def test_an_outage_takes_no_job_from_its_worker(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No renewal comes through for longer than the lease, and one worker is back before the other: afterwards
    each goes on with what it had."""
    early, late = workers = [await start_worker() for _ in range(2)]
    jobs = [await submit(queue, max_tokens=900) for _ in range(4)]
    await wait_until(lambda: sum(len(worker.engine.sequences) for worker in workers) == len(jobs))
    await wait_until(lambda: _reclaims(redis, early))
    held = [set(worker.process.arq.claims) for worker in workers]

    async def away(*arguments: object) -> None:
        raise RedisConnectionError("away")

    for worker in workers:
        monkeypatch.setattr(worker.process.queue, "renew", away)
    await wait_until(lambda: _all_lapsed(redis, len(jobs)))
    monkeypatch.setattr(early.process.queue, "renew", queue.renew)
    await wait_until(lambda: _in_contact_again(redis, early))
    monkeypatch.setattr(late.process.queue, "renew", queue.renew)
    await wait_until(lambda: _reclaims(redis, early))
    for worker in workers:
        await wait_until(lambda worker=worker: registered(redis, worker.process))
    assert [set(worker.process.arq.claims) for worker in workers] == held
    assert {claim.attempt for worker in workers for claim in worker.process.arq.claims.values()} == {1}


async def _all_lapsed(redis: ArqRedis, count: int) -> bool:
    seconds, micro = await redis.time()
    now = seconds * 1000 + micro / 1000
    return await redis.zcount(keys.leases(MODEL), 0, now) == count


async def _in_contact_again(redis: ArqRedis, worker: RunningWorker) -> bool:
    return bool(await redis.exists(keys.contact(worker.process.id)))


async def _reclaims(redis: ArqRedis, worker: RunningWorker) -> bool:
    """Whether it may take others' jobs: it has been in contact for a lease."""
    seconds, micro = await redis.time()
    began = await redis.get(keys.contact(worker.process.id))
    return began is not None and seconds + micro / 1e6 - int(began) / 1000 > LEASE_S


async def test_renewals_go_on_while_another_call_gets_no_answer(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    job = await submit(queue)
    await running(worker)
    held_up = asyncio.Event()

    async def no_answer(*arguments: object) -> None:
        held_up.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(worker.process.registry, "announce", no_answer)
    await asyncio.wait_for(held_up.wait(), 10)
    lapses = await redis.zscore(keys.leases(MODEL), job.id)
    await wait_until(lambda: _later(redis, job, lapses))


async def _later(redis: ArqRedis, job: GenerationJob, lapses: float) -> bool:
    return float(await redis.zscore(keys.leases(MODEL), job.id)) > lapses + 300


async def test_a_renewal_that_gets_no_answer_is_tried_again_within_the_lease(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await start_worker()
    await submit(queue)
    await running(worker)
    calls: list[float] = []
    clock = asyncio.get_running_loop().time

    async def no_answer(*arguments: object) -> list[str]:
        calls.append(clock())
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(worker.process.queue, "renew", no_answer)
    await wait_until(lambda: len(calls) >= 3)
