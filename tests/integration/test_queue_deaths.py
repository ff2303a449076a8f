"""Whom the leased queue blames when a worker dies, and what it makes of that."""

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.jobs import GenerationJob
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from tests.integration.deaths import CONTACT_S, begin, die
from tests.integration.queues import DONE, LEASE_S, claimed, submit
from tests.jobs import MODEL

pytestmark = pytest.mark.usefixtures("finished_queue")


async def sealed_as_used_up(queue: JobQueue, claim: Claim, owner: str) -> None:
    await queue.streams.seal(claim.job_id, DONE)
    assert await queue.finish(MODEL, claim, owner)


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
