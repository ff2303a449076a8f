"""arq's worker, event-driven and leased.

`LeasedWorker` keeps arq's job format, serializer hooks, try counting, job runner and life cycle. It diverges
from arq 0.28 in this, and in nothing else:

1. **Claim.** arq leaves running jobs in the queue's sorted set and probes each with four round trips at every
   poll. Here one script takes up to k jobs out of the queue and under a lease (`JobQueue.claim`).
2. **Poll.** arq sleeps half a second between polls. Here a worker with free slots waits for a wake token,
   which every enqueue pushes, and one without waits for a slot.
3. **Lease.** arq marks a job as running for job_timeout + 10 s, so a killed worker's jobs wait that long.
   Here the mark is a short lease, renewed by heartbeat; when it lapses any live worker returns the job.
4. **Finish.** arq deletes the job whoever runs it now. Here a script compares owner and attempt first, and a
   job that was not finished goes back to the head of the queue at once, at no cost in tries.
5. **Failure.** arq's silent endings (expired, unreadable, unknown function, tries used up, aborted before
   its start) seal the stream with an error, so that whoever reads it learns of it.
6. **Redis away.** Any Redis error ends arq's worker. Here the poll waits until Redis is back, and a job
   that could not be started goes back to the queue.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from arq.connections import ArqRedis
from arq.worker import Worker
from redis.exceptions import RedisError

from llmboost import keys
from llmboost.connection import BLOCK_S, deserialize, serialize
from llmboost.entries import StreamError, Terminal
from llmboost.queue import Claim, JobQueue
from llmboost.streams import Writer, persist

logger = logging.getLogger(__name__)

NO_TIMEOUT_S = 10 * 365 * 86400
"""arq wants a limit on a job's run time; ours is the request's deadline, kept by the reaper."""


class LeasedWorker(Worker):
    """Claims the jobs of one model; see the module docstring for what is arq's and what is not."""

    def __init__(
        self,
        queue: JobQueue,
        *,
        model: str,
        owner: str,
        lease: float,
        max_tries: int,
        max_jobs: int,
        redis_pool: ArqRedis,
        **options: Any,
    ) -> None:
        super().__init__(
            queue_name=keys.queue(model, "interactive"),
            redis_pool=redis_pool,
            max_jobs=max_jobs,
            max_tries=max_tries,
            job_timeout=NO_TIMEOUT_S,
            keep_result=0,
            poll_delay=0,
            health_check_interval=30,
            log_results=False,
            job_serializer=serialize,
            job_deserializer=deserialize,
            **options,
        )
        self.queue = queue
        self.model = model
        self.owner = owner
        self.lease = lease
        self.claims: dict[str, Claim] = {}
        """By job id: what this worker holds and renews."""
        self.on_lost: Callable[[str], None] = lambda job_id: None
        """Called with the id of a job that another worker has taken over."""
        self._settling: set[str] = set()
        """Ids of claims whose finish or release is on its way."""
        self._slot_freed = asyncio.Event()

    async def main(self) -> None:
        """arq's main loop, begun when Redis answers."""
        await persist(self.pool.ping)
        await super().main()

    # Claim and poll

    async def _poll_iteration(self) -> None:
        try:
            await self._claim_or_wait()
            await self.heart_beat()
        except (RedisError, OSError) as error:
            logger.warning("Redis is away: %s", error)
            await persist(self.pool.ping)
            logger.info("Redis is back")
        for job_id, task in list(self.tasks.items()):
            if task.done():
                del self.tasks[job_id]

    async def _claim_or_wait(self) -> None:
        self._slot_freed.clear()
        free = self.max_jobs - self.job_counter
        if free <= 0 or not self.allow_pick_jobs:
            await self._slot_freed.wait()
            return
        claims = await self.queue.claim(self.model, free, self.owner, self.lease)
        for claim in claims:
            await self._start(claim)
        if not claims:
            await self.queue.wait(self.model, BLOCK_S)

    async def _start(self, claim: Claim) -> None:
        await self.sem.acquire()
        self.job_counter += 1
        self.claims[claim.job_id] = claim
        task = self.loop.create_task(self._run(claim))
        self.tasks[claim.job_id] = task
        task.add_done_callback(lambda _: self._release_sem_dec_counter_on_complete())

    async def _run(self, claim: Claim) -> None:
        """arq's job runner; a job that did not get as far as its function goes back to the queue."""
        try:
            await self.run_job(claim.job_id, claim.score)
        except (Exception, asyncio.CancelledError) as error:
            logger.warning("%s goes back to the queue: %r", claim.job_id, error)
            settling = self.loop.create_task(self._settle(claim, finished=False))
            while not settling.done():
                with contextlib.suppress(asyncio.CancelledError):  # whoever is impatient waits for this
                    await asyncio.wait({settling})
        finally:
            self._slot_freed.set()

    async def _settle(self, claim: Claim, *, finished: bool) -> None:
        if self.claims.get(claim.job_id) is not claim:
            return  # another worker's by now
        self._settling.add(claim.job_id)
        try:
            if finished:
                await persist(lambda: self.queue.finish(self.model, claim, self.owner))
            else:
                await persist(lambda: self.queue.release(claim, self.owner))
            self.claims.pop(claim.job_id, None)
        finally:
            self._settling.discard(claim.job_id)

    # Lease

    async def renew(self) -> None:
        """Extends the leases of all jobs held, and drops those that are no longer ours."""
        held = list(self.claims.values())
        for job_id in await self.queue.renew(self.model, self.owner, self.lease, held):
            if job_id not in self.claims or job_id in self._settling:
                continue  # its own finish came between
            logger.warning("%s was taken over by another worker", job_id)
            self.claims.pop(job_id, None)
            self.on_lost(job_id)

    # Finish

    async def finish_job(
        self,
        job_id: str,
        finish: bool,
        result_data: bytes | None,
        result_timeout_s: float | None,
        keep_result_forever: bool,
        incr_score: int | None,
        keep_in_progress: float | None,
    ) -> None:
        """Deletes a job that has ended, or hands one that was interrupted back to the queue's head."""
        if claim := self.claims.get(job_id):
            await self._settle(claim, finished=finish)

    async def finish_failed_job(self, job_id: str, result_data: bytes | None) -> None:
        """Seals the stream of a job that arq won't run, then deletes the job."""
        claim = self.claims.get(job_id)
        if claim is None:
            return
        reason = str(msgspec.msgpack.decode(result_data)["r"]) if result_data else "it can't be run"
        terminal = Terminal(f"{self.owner}/{claim.attempt}", error=self._failure(reason))
        await self.queue.streams.seal(job_id, terminal, Writer(job_id, claim.attempt))
        await self._settle(claim, finished=True)

    def _failure(self, reason: str) -> StreamError:
        if "retries exceeded" in reason:
            return StreamError(
                f"The request was given up after {self.max_tries} tries: each time, its worker died.",
                code="tries_used_up",
            )
        return StreamError(f"The request was not run: {reason}.", code="job_failed")
