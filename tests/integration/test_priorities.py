"""Batch jobs have every free slot until an interactive one comes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost import keys
from llmboost.entries import Started
from llmboost.jobs import GenerationJob, JobClass
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_worker.text import Tokenizer
from llmboost_worker.wakes import Wakes
from tests.integration.deaths import begin, die, is_suspect, none_on_probation
from tests.integration.workers import (
    LEASE_S,
    RunningWorker,
    StartWorker,
    emitted,
    ended,
    expected_ids,
    step_until,
    submit,
    text,
    transcript,
)
from tests.jobs import MODEL
from tests.waiting import wait_until


async def submit_batch(queue: JobQueue, count: int = 1, **fields: object) -> list[GenerationJob]:
    """Older ones first."""
    return [await submit(queue, job_class="batch", text=f"batch {i}", **fields) for i in range(count)]


def has(worker: RunningWorker, *jobs: GenerationJob) -> Callable[[], bool]:
    """Whether the engine has sequences of exactly these jobs."""
    return lambda: {each.partition("#")[0] for each in worker.engine.sequences} == {job.id for job in jobs}


async def waiting(queue: JobQueue, job_class: JobClass = "batch") -> list[str]:
    return [each.decode() for each in await queue.redis.zrange(keys.queue(MODEL, job_class), 0, -1)]


async def waits(queue: JobQueue, *jobs: GenerationJob) -> bool:
    return await waiting(queue) == [job.id for job in jobs]


async def attempts(streams: TokenStreams, job: GenerationJob) -> int:
    return sum(isinstance(entry, Started) for _, entry in await streams.read(job.id))


async def is_whole(
    streams: TokenStreams, job: GenerationJob, worker: RunningWorker, tokenizer: Tokenizer
) -> None:
    """The stream is that of an unbroken run."""
    assert (await ended(streams, job)).error is None
    expected = expected_ids(job, worker, tokenizer, job.sampling.max_tokens or 0)
    assert (await transcript(streams, job)).choices[0].token_ids == expected
    assert await text(streams, job) == tokenizer.decode(expected)


@asynccontextmanager
async def nothing_sent(worker: RunningWorker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Redis takes nothing from the worker's publisher."""
    send, back = worker.process.publisher._send, asyncio.Event()

    async def sent_when_back() -> None:
        if not back.is_set():
            raise RedisConnectionError("away")
        await send()

    monkeypatch.setattr(worker.process.publisher, "_send", sent_when_back)
    yield
    back.set()


# Giving way


async def test_the_youngest_batch_job_gives_its_slot_before_the_next_step(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    """It goes back to the head of its queue with what it has, at the cost of no try."""
    worker = await start_worker(slots=2)
    old, young, later = await submit_batch(queue, 3, max_tokens=900)
    await wait_until(has(worker, old, young))
    await step_until(worker, lambda: emitted(streams, young, 3))
    interactive = await submit(queue)
    await wait_until(has(worker, old, interactive))
    await wait_until(lambda: waits(queue, young, later))
    assert not await redis.hexists(keys.claim(young.id), "deaths")
    assert not await is_suspect(redis, young)
    assert await redis.zscore(keys.leases(MODEL), young.id) is None
    assert worker.process._generator.evictions == 1


async def test_what_gave_way_goes_on_where_it_was_when_a_slot_is_free(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    worker = await start_worker(slots=1)
    [job] = await submit_batch(queue)
    await wait_until(has(worker, job))
    await step_until(worker, lambda: emitted(streams, job, 5))
    interactive = await submit(queue, max_tokens=3)
    await wait_until(has(worker, interactive))
    await wait_until(lambda: waits(queue, job))
    tokens = (await transcript(streams, job)).completion_tokens
    await step_until(worker, has(worker, job))
    [(request, _)] = worker.engine.sequences.values()
    assert len(request.output_ids) == tokens
    await step_until(worker, has(worker))
    await is_whole(streams, interactive, worker, tokenizer)
    await is_whole(streams, job, worker, tokenizer)


async def test_another_worker_goes_on_with_what_gave_way(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    full = await start_worker(slots=1)
    [job] = await submit_batch(queue)
    await wait_until(has(full, job))
    await step_until(full, lambda: emitted(streams, job, 5))
    interactive = await submit(queue, max_tokens=900)
    await wait_until(has(full, interactive))
    other = await start_worker(slots=1)
    await wait_until(has(other, job))
    await step_until(other, has(other))
    await is_whole(streams, job, full, tokenizer)


async def test_one_that_has_no_token_yet_begins_anew(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    worker = await start_worker(slots=1)
    [job] = await submit_batch(queue)
    await wait_until(has(worker, job))
    interactive = await submit(queue, max_tokens=1)
    await wait_until(has(worker, interactive))
    await step_until(worker, has(worker, job))
    await step_until(worker, has(worker))
    await is_whole(streams, job, worker, tokenizer)
    assert await attempts(streams, job) == 2


async def test_a_step_that_was_handed_over_before_is_not_lost(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    """It ended while the worker was deciding who gives way. One of the jobs had its last token in it: it is
    sealed and does not go back. The other goes on behind it."""
    worker = await start_worker(slots=2)
    cancel = worker.engine.cancel

    def cancel_after_a_step(sequences: list[str]) -> None:
        worker.engine.cancel = cancel  # type: ignore[method-assign]
        worker.engine.step()
        cancel(sequences)

    [done] = await submit_batch(queue, max_tokens=1)
    [goes_on] = await submit_batch(queue, max_tokens=4)
    await wait_until(has(worker, done, goes_on))
    worker.engine.cancel = cancel_after_a_step  # type: ignore[method-assign]
    interactive = await submit(queue, n=2, max_tokens=4)
    await is_whole(streams, done, worker, tokenizer)
    assert await attempts(streams, done) == 1
    await wait_until(lambda: waits(queue, goes_on))
    assert (await transcript(streams, goes_on)).completion_tokens == 1
    await step_until(worker, has(worker, goes_on))
    await step_until(worker, has(worker))
    await is_whole(streams, goes_on, worker, tokenizer)
    assert (await ended(streams, interactive)).error is None


async def test_choices_are_counted_not_jobs(start_worker: StartWorker, queue: JobQueue) -> None:
    """Three jobs of four choices fill four slots, and one of three choices needs three of them."""
    worker = await start_worker(slots=4)
    [wide] = await submit_batch(queue, n=2, max_tokens=900)
    narrow = await submit_batch(queue, 2, max_tokens=900)
    [late] = await submit_batch(queue, max_tokens=900)
    await wait_until(has(worker, wide, *narrow))
    assert await waiting(queue) == [late.id]
    interactive = await submit(queue, n=4, max_tokens=900)
    await wait_until(has(worker, interactive))
    await wait_until(lambda: waits(queue, wide, *narrow, late))


async def test_interactive_jobs_do_not_make_way_for_each_other(
    start_worker: StartWorker, queue: JobQueue
) -> None:
    worker = await start_worker(slots=2)
    jobs = [await submit(queue, max_tokens=900) for _ in range(2)]
    await wait_until(has(worker, *jobs))
    await submit(queue)
    [batch] = await submit_batch(queue)
    assert worker.process.arq.room() == {"interactive": 0, "batch": 0}
    other = await start_worker(slots=2)
    await wait_until(lambda: batch.id in {each.partition("#")[0] for each in other.engine.sequences})
    assert has(worker, *jobs)()


# While other things go wrong


async def test_what_was_delivered_is_kept_while_redis_takes_nothing(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The slot changes hands all the same; the job goes back when its tokens are in the log."""
    worker = await start_worker(slots=1)
    [job] = await submit_batch(queue)
    await wait_until(has(worker, job))
    async with nothing_sent(worker, monkeypatch):
        for _ in range(5):
            worker.engine.step()
        interactive = await submit(queue, max_tokens=2)
        await wait_until(has(worker, interactive))
        assert await waiting(queue) == []
        assert (await transcript(streams, job)).completion_tokens == 0
    await wait_until(lambda: waits(queue, job))
    assert (await transcript(streams, job)).completion_tokens == 5
    await step_until(worker, has(worker, job))
    await step_until(worker, has(worker))
    await is_whole(streams, job, worker, tokenizer)
    await is_whole(streams, interactive, worker, tokenizer)


async def test_a_worker_that_is_told_to_go_meanwhile_hands_over_both(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    redis: ArqRedis,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await start_worker(slots=1)
    [job] = await submit_batch(queue)
    await wait_until(has(worker, job))
    await step_until(worker, lambda: emitted(streams, job, 3))
    async with nothing_sent(worker, monkeypatch):
        worker.engine.step()
        interactive = await submit(queue)
        await wait_until(has(worker, interactive))
        await worker.terminate()
    assert await waiting(queue) == [job.id]
    assert await waiting(queue, "interactive") == [interactive.id]
    assert not await redis.hexists(keys.claim(job.id), "deaths")
    second = await start_worker(slots=1)
    await wait_until(has(second, interactive))
    await step_until(second, has(second, job))
    await step_until(second, has(second))
    await is_whole(streams, job, second, tokenizer)


async def test_one_that_lost_its_lease_meanwhile_writes_nothing_more(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await start_worker(slots=1)
    [job] = await submit_batch(queue)
    await wait_until(has(worker, job))
    async with nothing_sent(worker, monkeypatch):
        worker.engine.step()
        interactive = await submit(queue, max_tokens=1)
        await wait_until(has(worker, interactive))
        arq = worker.process.arq
        await queue.release(arq.owner, [arq.claims[job.id]])
        await arq.renew()
        await wait_until(lambda: job.id not in worker.process._generator.running)
    await step_until(worker, has(worker, job))
    await step_until(worker, has(worker))
    await is_whole(streams, job, worker, tokenizer)


async def test_the_deaths_of_earlier_attempts_are_kept(
    start_worker: StartWorker, queue: JobQueue, redis: ArqRedis
) -> None:
    """Giving way counts as no death, and clears nobody. On its last try too: the next worker has it on
    probation."""
    [once] = await submit_batch(queue, max_tokens=900)
    [twice] = await submit_batch(queue, max_tokens=900)
    for job in (once, twice, twice):
        claims = await queue.claim(MODEL, 8, "dead", LEASE_S)
        guilty = [claim for claim in claims if claim.job_id == job.id]
        await queue.release("dead", [claim for claim in claims if claim not in guilty])
        await begin(queue, guilty)
        await die(queue, guilty)
    worker = await start_worker(slots=2)
    await wait_until(has(worker, once, twice))
    assert await redis.get(keys.probation(worker.process.id)) == twice.id.encode()
    interactive = await submit(queue, n=2, max_tokens=900)
    await wait_until(has(worker, interactive))
    await wait_until(lambda: none_on_probation(redis))
    for job, count in ((once, 1), (twice, 2)):
        assert int(await redis.hget(keys.claim(job.id), "deaths")) == count
        assert not await is_suspect(redis, job)
    assert await waiting(queue) == [once.id]
    assert await redis.zrange(keys.queue(MODEL, "batch") + keys.LAST, 0, -1) == [twice.id.encode()]


async def test_a_flood_of_interactive_jobs_loses_no_batch_job(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    """On two workers that step by themselves."""
    workers = [await start_worker(slots=3), await start_worker(slots=3)]
    batch = await submit_batch(queue, 12, max_tokens=40)
    for worker in workers:
        worker.engine.run(interval=0.001)
    interactive = []
    for i in range(40):
        interactive.append(await submit(queue, text=f"prompt {i}", max_tokens=3))
        if i % 4 == 3:
            await ended(streams, interactive[-1])
    for job in interactive + batch:
        await is_whole(streams, job, workers[0], tokenizer)
    assert sum(worker.process._generator.evictions for worker in workers) > 0


# Waiting for work


async def test_a_token_that_comes_when_there_is_no_room_for_it_wakes_another(queue: JobQueue) -> None:
    full, idle = Wakes(queue, MODEL), Wakes(queue, MODEL)
    freed, never = asyncio.Event(), asyncio.Event()
    freed.set()
    await full.wait(["interactive", "batch"], freed)  # its waits go on
    waits = [
        asyncio.create_task(full.wait(["interactive"], never)),
        asyncio.create_task(idle.wait(["batch"], never)),
    ]
    await queue.wake(MODEL, ["batch"])
    await asyncio.wait_for(waits[1], 1)
    assert not waits[0].done()
    await queue.wake(MODEL, ["interactive"])
    await asyncio.wait_for(waits[0], 1)
    await full.aclose()
    await idle.aclose()
