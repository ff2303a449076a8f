"""The leased queue against a real server."""

import asyncio

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.entries import StreamError, Terminal
from llmboost.jobs import FUNCTION
from llmboost.queue import JobQueue, QueueFull
from llmboost.streams import TokenStreams, Writer
from tests.integration.deaths import CONTACT_S, in_contact, reclaimed
from tests.integration.queues import DONE, LEASE_S, claimed, submit
from tests.jobs import MODEL, make_job
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("finished_queue")


async def test_a_job_is_an_arq_job(queue: JobQueue) -> None:
    """arq's own tools list it; the prompt does not show in what arq logs."""
    [job] = await submit(queue, text="a secret")
    [definition] = await queue.redis.queued_jobs(queue_name=keys.queue(MODEL, "interactive"))
    assert (definition.function, definition.job_id) == (FUNCTION, job.id)
    assert definition.args[0].decode() == job
    assert "secret" not in repr(definition)


async def test_a_submission_sent_again_is_one_job(queue: JobQueue, streams: TokenStreams) -> None:
    job = make_job()
    await queue.submit(job)
    await queue.submit(job)
    assert await claimed(queue) == [job.id]
    assert len(await streams.read(job.id)) == 1


async def test_a_full_queue_refuses_and_writes_nothing(queue: JobQueue, redis: ArqRedis) -> None:
    await submit(queue, 2)
    before = sorted(await redis.keys("*"))
    with pytest.raises(QueueFull, match="2 requests"):
        await queue.submit(make_job(), max_queued=2)
    assert sorted(await redis.keys("*")) == before


async def test_interactive_jobs_come_first_and_the_oldest_of_them(queue: JobQueue) -> None:
    batch = await submit(queue, 2, job_class="batch")
    interactive = await submit(queue, 3)
    expected = [job.id for job in interactive + batch]
    assert await claimed(queue, 4) == expected[:4]
    assert await claimed(queue, 4) == expected[4:]
    assert await claimed(queue, 4) == []


async def test_every_dispatch_has_a_higher_attempt(queue: JobQueue) -> None:
    [job] = await submit(queue)
    for attempt in (1, 2, 3):
        [claim] = await queue.claim(MODEL, 1, "w", LEASE_S)
        assert (claim.job_id, claim.attempt) == (job.id, attempt)
        assert await queue.release("w", [claim]) == []


async def test_one_enqueue_wakes_one_worker(queue: JobQueue) -> None:
    waits = [asyncio.create_task(queue.wait(MODEL, 0.5)) for _ in range(2)]
    await wait_until(lambda: _blocked(queue, 2))
    await submit(queue)
    assert sorted([await wait for wait in waits]) == [False, True]


async def _blocked(queue: JobQueue, count: int) -> bool:
    return (await queue.redis.info("clients"))["blocked_clients"] == count


async def test_tokens_of_jobs_that_are_there_no_more_wake_nobody(queue: JobQueue, redis: ArqRedis) -> None:
    await submit(queue, 5, job_class="batch")
    assert len(await claimed(queue, 5)) == 5
    assert await redis.llen(keys.wake(MODEL, "batch")) == 5
    assert await claimed(queue, 5) == []
    assert await redis.llen(keys.wake(MODEL, "batch")) == 0


async def test_beyond_the_room_for_batch_jobs_only_interactive_ones_are_taken(queue: JobQueue) -> None:
    batch = await submit(queue, 3, job_class="batch")
    interactive = await submit(queue, 3)
    taken = await queue.claim(MODEL, {"interactive": 2, "batch": 0}, "w", LEASE_S)
    taken += await queue.claim(MODEL, {"interactive": 2, "batch": 2}, "w", LEASE_S)
    assert [(each.job_id, each.job_class) for each in taken] == [
        *((job.id, "interactive") for job in interactive),
        (batch[0].id, "batch"),
    ]


async def test_a_claim_counts_choices(queue: JobQueue) -> None:
    """The last one taken may need more than there is: else one of many choices would wait for ever."""
    wide, narrow, last = [*await submit(queue, n=3), *await submit(queue, 2)]
    claims = await queue.claim(MODEL, 4, "w", LEASE_S)
    assert [(each.job_id, each.sequences) for each in claims] == [(wide.id, 3), (narrow.id, 1)]
    await queue.release("w", claims)
    assert await claimed(queue, 2) == [wide.id]
    assert await claimed(queue, 2) == [narrow.id, last.id]


async def test_a_lapsed_lease_returns_the_job_to_the_head(queue: JobQueue) -> None:
    first, second, third = await submit(queue, 3)
    [claim] = await queue.claim(MODEL, 1, "dead", 0.02)
    assert claim.job_id == first.id
    assert await claimed(queue, 1, owner="alive") == [second.id]
    await reclaimed(queue)
    assert await claimed(queue) == [first.id, third.id]


async def test_a_renewed_lease_does_not_lapse(queue: JobQueue) -> None:
    await submit(queue)
    claims = await queue.claim(MODEL, 1, "w", 0.02)
    assert await queue.renew(MODEL, "w", LEASE_S, claims) == []
    await asyncio.wait_for(_clock_passes(queue, 0.03), 5)
    await in_contact(queue)
    assert await queue.reclaim(MODEL, "survivor", CONTACT_S, 3) == []


async def _clock_passes(queue: JobQueue, seconds: float) -> None:
    start, micro = await queue.redis.time()
    await wait_until(lambda: _after(queue, start + micro / 1e6 + seconds))


async def _after(queue: JobQueue, moment: float) -> bool:
    seconds, micro = await queue.redis.time()
    return seconds + micro / 1e6 > moment


async def test_a_worker_that_lost_its_lease_changes_nothing(queue: JobQueue, redis: ArqRedis) -> None:
    """Even under the same name: the attempt tells the two claims apart."""
    [job] = await submit(queue)
    [old] = await queue.claim(MODEL, 1, "w", 0.001)
    await reclaimed(queue)
    [new] = await queue.claim(MODEL, 1, "w", LEASE_S)
    assert await queue.renew(MODEL, "w", LEASE_S, [old]) == [job.id]
    assert await queue.release("w", [old]) == [job.id]
    assert not await queue.finish(MODEL, old, "w")
    assert await redis.exists(keys.arq_job(job.id))
    assert await queue.renew(MODEL, "w", LEASE_S, [new]) == []
    assert await queue.finish(MODEL, new, "w")


async def test_nothing_stays_of_a_job_that_was_over_when_it_was_run(queue: JobQueue) -> None:
    """A killed server had forgotten that it was finished, so it was claimed again."""
    [job] = await submit(queue)
    [claim] = await queue.claim(MODEL, 1, "w", LEASE_S)
    await queue.streams.seal(job.id, DONE)
    assert await queue.finish(MODEL, claim, "w")
    await queue.redis.set(keys.arq_retry(job.id), 1, ex=60)  # arq counts before it looks
    assert not await queue.finish(MODEL, claim, "w")
    assert not await queue.redis.exists(keys.arq_retry(job.id))


# Outages


async def test_only_a_worker_that_was_in_contact_for_a_lease_reclaims(queue: JobQueue) -> None:
    """Else the first to reconnect after an outage would take everybody's jobs."""
    await submit(queue)
    await queue.claim(MODEL, 1, "w", 0.001)
    assert await queue.reclaim(MODEL, "survivor", CONTACT_S, 3) == [], "it has never been in contact"
    await in_contact(queue)
    await wait_until(lambda: _expired(queue, keys.contact("survivor")))  # its renewals are held up
    assert await queue.reclaim(MODEL, "survivor", CONTACT_S, 3) == []
    await queue.renew(MODEL, "survivor", CONTACT_S, [])
    assert await queue.reclaim(MODEL, "survivor", CONTACT_S, 3) == [], "it has only just come back"
    assert await reclaimed(queue)


async def _expired(queue: JobQueue, key: str) -> bool:
    return not await queue.redis.exists(key)


async def test_a_lapsed_lease_that_nobody_has_reclaimed_is_renewed(queue: JobQueue) -> None:
    """After an outage a worker goes on with the jobs that it had."""
    await submit(queue)
    claims = await queue.claim(MODEL, 1, "w", 0.001)
    await in_contact(queue)
    assert await queue.renew(MODEL, "w", LEASE_S, claims) == []
    assert await queue.reclaim(MODEL, "survivor", CONTACT_S, 3) == []


# How a job ends, and what it costs


async def test_a_finished_job_leaves_only_its_stream(
    queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    [job] = await submit(queue)
    [claim] = await queue.claim(MODEL, 1, "w", LEASE_S)
    await streams.seal(job.id, DONE)
    assert await queue.finish(MODEL, claim, "w")
    left = {keys.stream(job.id), keys.wake(MODEL, "interactive")}
    assert {key.decode() for key in await redis.keys("*")} == left


async def test_a_cancelled_job_is_not_claimed(queue: JobQueue) -> None:
    first, second = await submit(queue, 2)
    await queue.cancel(first.id, Terminal("test", error=StreamError("cancelled")))
    assert await claimed(queue) == [second.id]


async def test_an_overdue_request_is_sealed_wherever_it_is(queue: JobQueue, streams: TokenStreams) -> None:
    [waiting] = await submit(queue, lasts=0.01)
    [running] = await submit(queue, lasts=0.01)
    [_, claim] = await queue.claim(MODEL, 2, "w", LEASE_S)
    assert claim.job_id == running.id
    [in_time] = await submit(queue)
    await wait_until(lambda: _sealed(queue, streams, waiting.id))
    await wait_until(lambda: _sealed(queue, streams, running.id))
    [*_, (_, terminal)] = await streams.read(running.id)
    assert terminal.error.code == "request_timeout"
    assert await claimed(queue) == [in_time.id]


async def _sealed(queue: JobQueue, streams: TokenStreams, job_id: str) -> bool:
    await queue.reap("reaper")
    return isinstance((await streams.read(job_id))[-1][1], Terminal)


async def test_a_request_that_no_queue_and_no_lease_holds_is_sealed(
    queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    """The job was lost, or deleted by a worker that failed to seal."""
    lost, waiting, running = await submit(queue, 3)
    await redis.zrem(keys.queue(MODEL, "interactive"), lost.id)
    await redis.delete(keys.claim(lost.id), keys.arq_job(lost.id))
    await claimed(queue, 1)
    assert await queue.reap("reaper") == 1
    [*_, (_, terminal)] = await streams.read(lost.id)
    assert terminal.error.code == "request_lost"
    for job in (waiting, running):
        assert len(await streams.read(job.id)) == 1


async def test_a_claim_costs_the_same_however_many_jobs_run(queue: JobQueue, redis: ArqRedis) -> None:
    """Counted by the server, the commands inside the script included."""
    costs = []
    for running in (0, 100, 400):
        await submit(queue, running)
        assert len(await claimed(queue, running)) == running
        await submit(queue)
        before = await _commands(redis)
        assert len(await claimed(queue, 4)) == 1
        costs.append(await _commands(redis) - before)
    assert len(set(costs)) == 1, costs


async def _commands(redis: ArqRedis) -> int:
    stats = await redis.info("commandstats")
    return sum(stat["calls"] for name, stat in stats.items() if not name.startswith("cmdstat_info"))


async def test_attempts_and_fences_agree(queue: JobQueue, streams: TokenStreams) -> None:
    """The attempt that a claim hands out is above any that has written."""
    [job] = await submit(queue)
    for _ in range(3):
        [claim] = await queue.claim(MODEL, 1, "w", LEASE_S)
        await streams.begin(Writer(job.id, claim.attempt), "w")
        await queue.release("w", [claim])
