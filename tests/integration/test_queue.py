"""The leased queue against a real server."""

import asyncio

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.entries import StreamError, Terminal
from llmboost.jobs import FUNCTION, GenerationJob
from llmboost.leases import Claim
from llmboost.queue import JobQueue, QueueFull
from llmboost.streams import TokenStreams, Writer
from tests.integration.deaths import CONTACT_S, begin, die, in_contact, reclaimed
from tests.jobs import MODEL, make_job
from tests.waiting import wait_until

DONE = Terminal("test")
LEASE_S = 30.0


async def submit(queue: JobQueue, count: int = 1, **fields: object) -> list[GenerationJob]:
    jobs = [make_job(**fields) for _ in range(count)]
    for job in jobs:
        await queue.submit(job)
    return jobs


async def claimed(queue: JobQueue, count: int = 100, owner: str = "w", lease: float = LEASE_S) -> list[str]:
    return [claim.job_id for claim in await queue.claim(MODEL, count, owner, lease)]


async def sealed_as_used_up(queue: JobQueue, claim: Claim, owner: str) -> None:
    await queue.streams.seal(claim.job_id, DONE)
    assert await queue.finish(MODEL, claim, owner)


@pytest.fixture(autouse=True)
async def _finish_everything(queue: JobQueue):
    """Ends what a test leaves open, so that the check for leaked keys sees only leaks."""
    yield
    redis = queue.redis
    for job_id in await redis.zrange(keys.OPEN, 0, -1):
        await queue.cancel(job_id.decode(), DONE)
    for job_id in await redis.zrange(keys.leases(MODEL), 0, -1):
        await redis.zrem(keys.leases(MODEL), job_id)


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


# Who is to blame


@pytest.mark.parametrize("max_tries", [2, 3, 5])
async def test_a_poisonous_request_is_given_up_and_nobody_else(queue: JobQueue, max_tries: int) -> None:
    """It kills whoever runs it, beside 20 others, until its tries are used up; then all others are run."""
    jobs = await submit(queue, 21)
    poison = jobs[10].id
    deaths, running = 0, set[str]()
    for generation in range(2 * max_tries):
        owner, held = f"w{generation}", list[Claim]()
        while claims := await queue.claim(MODEL, 4, owner, LEASE_S):
            held += claims
            await begin(queue, [claim for claim in claims if not claim.used_up])
            if any(claim.job_id == poison and not claim.used_up for claim in claims):
                break
            for claim in claims:
                if claim.used_up:
                    assert claim.job_id == poison
                    await sealed_as_used_up(queue, claim, owner)
                if claim.on_probation:
                    await queue.renew(MODEL, owner, LEASE_S, [claim], {claim})
                    await queue.end_probation(MODEL, owner, claim.job_id)
        else:
            running = {claim.job_id for claim in held if not claim.used_up}
            break
        await die(queue, held, max_tries)
        deaths += 1
    assert deaths == max_tries
    assert running == {job.id for job in jobs} - {poison}


async def test_with_one_try_a_death_is_the_end_of_all_that_may_be_to_blame(queue: JobQueue) -> None:
    acquitted, suspect, _not_begun = claims = [
        (await queue.claim(MODEL, 1, "w", LEASE_S))[0] for _ in await submit(queue, 3)
    ]
    await begin(queue, [acquitted, suspect])
    await queue.renew(MODEL, "w", LEASE_S, claims, {acquitted})
    await die(queue, claims, max_tries=1)
    again: list[Claim] = []
    while some := await queue.claim(MODEL, 4, "other", LEASE_S):
        again += some
    assert {claim.job_id for claim in again if claim.used_up} == {suspect.job_id}
    assert {claim.job_id for claim in again} == {claim.job_id for claim in claims}


async def test_a_stream_that_goes_on_survives_any_number_of_deaths(queue: JobQueue) -> None:
    """Tries count deaths in a row without progress."""
    await submit(queue)
    for _ in range(5):
        for progress in (False, False, True):
            [claim] = await queue.claim(MODEL, 4, "w", LEASE_S)
            assert not claim.used_up
            await begin(queue, [claim])
            if progress:
                await queue.renew(MODEL, "w", LEASE_S, [claim], {claim})
                await queue.end_probation(MODEL, "w", claim.job_id)
            await die(queue, [claim])
    [claim] = await queue.claim(MODEL, 4, "w", LEASE_S)
    assert not claim.on_probation


async def on_last_try(queue: JobQueue, count: int) -> list[GenerationJob]:
    jobs = await submit(queue, count)
    for _ in range(2):
        claims = await queue.claim(MODEL, count, "w", LEASE_S)
        await begin(queue, claims)
        await die(queue, claims)
    return jobs


async def test_jobs_on_their_last_try_are_claimed_one_by_one(queue: JobQueue) -> None:
    """Each worker has one at most on probation, whatever else it runs."""
    first, second, third = await on_last_try(queue, 3)
    [fresh] = await submit(queue)
    assert await claimed(queue, 8, "a") == [first.id, fresh.id]
    assert await claimed(queue, 8, "a") == []
    assert await claimed(queue, 8, "b") == [second.id]
    await queue.end_probation(MODEL, "a", second.id)
    assert await claimed(queue, 8, "a") == [], "another's probation ended"
    await queue.end_probation(MODEL, "a", first.id)
    assert await queue.wait(MODEL, 1), "the worker is woken for the next"
    assert await claimed(queue, 8, "a") == [third.id]


async def test_jobs_that_lapse_after_the_one_on_probation_are_spared_too(queue: JobQueue) -> None:
    await on_last_try(queue, 2)
    [_, other] = claims = [
        *await queue.claim(MODEL, 8, "a", LEASE_S),
        *await _next_on_probation(queue, "a"),
    ]
    await begin(queue, claims)
    await die(queue, [other])
    await die(queue, claims[:1])
    [spared] = await queue.claim(MODEL, 8, "b", LEASE_S)
    [blamed] = await queue.claim(MODEL, 8, "c", LEASE_S)
    assert (spared.job_id, spared.used_up) == (claims[0].job_id, False)
    assert (blamed.job_id, blamed.used_up) == (other.job_id, True)


async def _next_on_probation(queue: JobQueue, owner: str) -> list[Claim]:
    await queue.redis.delete(keys.probation(owner))
    return await queue.claim(MODEL, 8, owner, LEASE_S)


async def test_a_claim_whose_reply_was_lost_costs_no_try(queue: JobQueue) -> None:
    """Nobody began the job, so nobody has died of it; and the worker may have another on probation."""
    await on_last_try(queue, 1)
    [unknown] = await queue.claim(MODEL, 8, "w", LEASE_S)
    await die(queue, [unknown])
    assert await queue.redis.pttl(keys.probation("w")) <= 2 * CONTACT_S * 1000
    [claim] = await queue.claim(MODEL, 8, "other", LEASE_S)
    assert not claim.used_up


async def test_a_hand_over_costs_no_try(queue: JobQueue) -> None:
    """Whatever has begun or not; and a job on its last try is still on it."""
    [last] = await on_last_try(queue, 1)
    await submit(queue, 3)
    claims = await queue.claim(MODEL, 8, "w", LEASE_S)
    await begin(queue, claims[:2])
    assert await queue.release("w", claims) == []
    again = await queue.claim(MODEL, 8, "other", LEASE_S)
    assert [claim.job_id for claim in again] == [claim.job_id for claim in claims]
    assert not any(claim.used_up for claim in again)
    assert [claim.job_id for claim in again if claim.on_probation] == [last.id]


async def test_a_job_on_its_last_try_waits_as_others_do(queue: JobQueue, redis: ArqRedis) -> None:
    """It counts as waiting, is no orphan, and can be cancelled."""
    first, second = await on_last_try(queue, 2)
    assert await queue.depth(MODEL, "interactive") == 2
    assert await queue.reap("reaper") == 0
    await queue.cancel(first.id, DONE)
    assert not await redis.exists(keys.claim(first.id))
    assert await claimed(queue) == [second.id]


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
