"""What tests of the leased queue share."""

from collections.abc import AsyncIterator

import pytest

from llmboost import keys
from llmboost.entries import Terminal
from llmboost.jobs import GenerationJob
from llmboost.queue import JobQueue
from tests.jobs import MODEL, make_job

DONE = Terminal("test")
LEASE_S = 30.0


async def submit(queue: JobQueue, count: int = 1, **fields: object) -> list[GenerationJob]:
    jobs = [make_job(**fields) for _ in range(count)]
    for job in jobs:
        await queue.submit(job)
    return jobs


async def claimed(queue: JobQueue, count: int = 100, owner: str = "w", lease: float = LEASE_S) -> list[str]:
    return [claim.job_id for claim in await queue.claim(MODEL, count, owner, lease)]


@pytest.fixture
async def finished_queue(queue: JobQueue) -> AsyncIterator[None]:
    """Ends what a test leaves open, so that the check for leaked keys sees only leaks."""
    yield
    redis = queue.redis
    for job_id in await redis.zrange(keys.OPEN, 0, -1):
        await queue.cancel(job_id.decode(), DONE)
    for job_id in await redis.zrange(keys.leases(MODEL), 0, -1):
        await redis.zrem(keys.leases(MODEL), job_id)
