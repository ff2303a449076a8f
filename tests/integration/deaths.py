"""Workers that die, as the queue sees them: claims that have begun, lapse and are put back by a survivor."""

from collections.abc import Sequence

from arq.connections import ArqRedis

from llmboost import keys
from llmboost.jobs import GenerationJob
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from tests.jobs import MODEL
from tests.waiting import wait_until

CONTACT_S = 0.1
"""The lease of workers that only reclaim."""


async def reclaimed(queue: JobQueue, max_tries: int = 3) -> list[str]:
    """What a worker that stays in contact puts back first."""

    async def beat() -> list[str]:
        await queue.renew(MODEL, "survivor", CONTACT_S, [])
        return await queue.reclaim(MODEL, "survivor", CONTACT_S, max_tries)

    return await wait_until(beat)


async def in_contact(queue: JobQueue) -> None:
    """The survivor's renewals have been unbroken for a lease."""

    async def beat() -> bool:
        await queue.renew(MODEL, "survivor", CONTACT_S, [])
        seconds, micro = await queue.redis.time()
        return seconds * 1000 + micro / 1000 - int(await since()) > CONTACT_S * 1000

    async def since() -> bytes:
        return await queue.redis.get(keys.contact("survivor")) or b"9999999999999"

    await wait_until(beat)


async def begin(queue: JobQueue, claims: Sequence[Claim]) -> None:
    """As arq's job runner does."""
    for claim in claims:
        await queue.redis.incr(keys.arq_retry(claim.job_id))
        await queue.redis.expire(keys.arq_retry(claim.job_id), 60)


async def die(queue: JobQueue, claims: Sequence[Claim], max_tries: int = 3) -> None:
    """The worker that holds these claims has died, and somebody puts the jobs back."""
    await queue.redis.zadd(keys.leases(MODEL), {claim.job_id: 0 for claim in claims}, xx=True)
    assert set(await reclaimed(queue, max_tries)) == {claim.job_id for claim in claims}


async def is_suspect(redis: ArqRedis, job: GenerationJob) -> bool:
    return bool(await redis.exists(keys.arq_retry(job.id)))


async def none_on_probation(redis: ArqRedis) -> bool:
    return not await redis.keys(keys.probation("*"))
