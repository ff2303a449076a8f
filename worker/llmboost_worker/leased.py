"""arq's worker, event-driven and leased.

`LeasedWorker` keeps arq's job format, serializer hooks, job runner and life cycle. It diverges from arq 0.28
in this, and in nothing else:

1. **Claim.** arq leaves running jobs in the queue's sorted set and probes each with four round trips at every
   poll. Here one script takes up to k jobs out of the queue and under a lease (`LeasedJobs.claim`).
2. **Poll.** arq sleeps half a second between polls. Here a worker with free slots waits for a wake token,
   which every enqueue pushes, and one without waits for a slot. One that is full of batch jobs waits for an
   interactive one too, since they give way to it (`generation`). Slots are counted in sequences, of which a
   job has one per choice.
3. **Lease.** arq marks a job as running for job_timeout + 10 s, so a killed worker's jobs wait that long.
   Here the mark is a short lease, renewed by heartbeat; when it lapses any live worker returns the job.
4. **Finish.** arq deletes the job whoever runs it now. Here a script compares owner and attempt first, and a
   job that was not finished goes back to the queue at once.
5. **Tries.** arq counts starts, whatever ended them. Here the deaths of workers are counted, and only against
   jobs that may be to blame (`llmboost.leases`); arq's own limit is out of reach.
6. **Failure.** arq's silent endings (expired, unreadable, unknown function, tries used up, aborted before
   its start) seal the stream with an error, so that whoever reads it learns of it.
7. **Redis away.** Any Redis error ends arq's worker. Here the poll waits until Redis is back, and a job
   that could not be started goes back to the queue.
8. **Told to go.** arq cancels its jobs and returns them one by one. Here the first thing that happens is one
   script that releases them all; and a claim under way is waited for, or nobody would know of its jobs.
"""

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import msgspec
from arq.connections import ArqRedis
from arq.worker import Worker
from redis.exceptions import RedisError

from llmboost import keys
from llmboost.connection import deserialize, serialize
from llmboost.entries import REQUEST_LOST, StreamError, Terminal
from llmboost.jobs import JOB_CLASSES, JobClass
from llmboost.leases import Claim
from llmboost.queue import JobQueue
from llmboost.streams import Writer, persist
from llmboost_worker.wakes import Wakes

logger = logging.getLogger(__name__)

NO_TIMEOUT_S = 10 * 365 * 86400
"""arq wants a limit on a job's run time; ours is the request's deadline, kept by the reaper."""
FIRST_BITE = 8
"""Sequences that a claim takes at most, so that idle workers share a burst. One that gets all it asked for
asks at once for twice as many, so alone it is soon full."""
ACQUITTED_AFTER_S = 1.0
"""An attempt that has appended tokens for so long is not what kills its worker."""
NOT_THERE = "job expired"
"""What arq says of a job whose definition is gone: a killed server has lost it, or that it was done."""
HAND_OVER_S = 1.5
"""How long a worker that is told to go tries to release its jobs; if Redis is away their leases lapse."""

current_claim: ContextVar[Claim] = ContextVar("current_claim")
"""In a job's task: the claim under which it runs. The job's id alone may name a later claim by now."""


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
            max_tries=sys.maxsize,
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
        self.deaths_allowed = max_tries
        self.claims: dict[str, Claim] = {}
        """By job id: what this worker holds and renews."""
        self.on_lost: Callable[[str], None] = lambda job_id: None
        """Called with the id of a job that another worker has taken over."""
        self.produced_for: Callable[[Claim], float] = lambda claim: 0.0
        """Seconds between the first and the latest new token that this attempt has appended."""
        self._acquitted: set[Claim] = set()
        self._probation: Claim | None = None
        self._settling: set[str] = set()
        """Ids of claims whose finish or release is on its way."""
        self._slot_freed = asyncio.Event()
        self.wakes = Wakes(queue, model)
        self._bite = FIRST_BITE
        self._claiming: asyncio.Task[list[Claim]] | None = None
        self._going: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()

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
        room = self.room()
        wanted = [each for each in JOB_CLASSES if room[each] > 0 and self.allow_pick_jobs]
        if wanted:
            bites = {each: min(room[each], self._bite) for each in JOB_CLASSES}
            self._claiming = self.loop.create_task(self._claim(bites))
            claims = await self._claiming
            had_all = sum(claim.sequences for claim in claims) >= bites[wanted[-1]]
            self._bite = max(FIRST_BITE, 2 * bites[wanted[-1]]) if had_all else FIRST_BITE
            for claim in claims:
                if self.claims.get(claim.job_id) is claim:  # else handed over already
                    self._start(claim)
            if claims:
                return
        await self.wakes.wait(wanted, self._slot_freed)

    def room(self) -> dict[JobClass, int]:
        """Sequences of each class that this worker could take on: batch jobs give way to interactive ones."""
        held = dict.fromkeys(JOB_CLASSES, 0)
        for claim in self.claims.values():
            held[claim.job_class] += claim.sequences
        free = self.max_jobs - held["interactive"]
        return {"interactive": max(0, free), "batch": max(0, free - held["batch"])}

    async def _claim(self, room: dict[JobClass, int]) -> list[Claim]:
        claims = await self.queue.claim(self.model, room, self.owner, self.lease)
        for claim in claims:
            self.claims[claim.job_id] = claim
            if claim.on_probation:
                self._probation = claim
        return claims

    def _start(self, claim: Claim) -> None:
        task = self.loop.create_task(self._run(claim, self.tasks.get(claim.job_id)))
        self.tasks[claim.job_id] = task

    async def _run(self, claim: Claim, before: "asyncio.Task[None] | None") -> None:
        """arq's job runner; a job that did not get as far as its function goes back to the queue.

        `before` runs an earlier attempt, if this worker has lost the job and got it back: it ends first.
        """
        current_claim.set(claim)
        try:
            if before is not None:
                before.cancel()
                await asyncio.wait({before})
            if claim.used_up:
                await self._fail(claim, self._tries_used_up())
            else:
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
                await persist(lambda: self.queue.release(self.owner, [claim]))
            self._drop(claim)
        finally:
            self._settling.discard(claim.job_id)

    def _drop(self, claim: Claim) -> None:
        """The claim is no longer ours."""
        if self.claims.get(claim.job_id) is claim:
            del self.claims[claim.job_id]
        if claim is self._probation:
            self._end_probation()

    # Lease

    async def renew(self) -> None:
        """Extends the leases of all jobs held, and drops those that are no longer ours."""
        held = dict(self.claims)
        acquitted = {
            claim
            for claim in held.values()
            if claim not in self._acquitted and self.produced_for(claim) >= ACQUITTED_AFTER_S
        }
        lost = await self.queue.renew(self.model, self.owner, self.lease, list(held.values()), acquitted)
        self._acquitted = (self._acquitted | acquitted) & set(held.values())
        if self._probation in acquitted:
            self._end_probation()
        for job_id in lost:
            if self.claims.get(job_id) is not held[job_id] or job_id in self._settling:
                continue  # its own finish came between, or a later claim
            logger.warning("%s was taken over by another worker", job_id)
            self._drop(held[job_id])
            self.on_lost(job_id)

    def _end_probation(self) -> None:
        assert self._probation is not None
        job_id, self._probation = self._probation.job_id, None
        self._in_background(persist(lambda: self.queue.end_probation(self.model, self.owner, job_id)))

    def _in_background(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # Told to go

    def handle_sig(self, signum: signal.Signals) -> None:
        """Hands everything over, then ends as arq does."""
        if self._going is None:
            self.allow_pick_jobs = False
            self._going = self.loop.create_task(self._go(signum))

    async def _go(self, signum: signal.Signals) -> None:
        if self.on_stop:
            self.on_stop(signum)
        logger.info("told to go, with %d jobs", len(self.claims))
        try:
            async with asyncio.timeout(min(HAND_OVER_S, self.lease)):
                await self._hand_over()
                if self._claiming is not None and not self._claiming.done():
                    await asyncio.wait({self._claiming})
                    await self._hand_over()
                await asyncio.gather(*self._background)
        except Exception as error:  # whatever it is, the process ends
            logger.warning("the jobs go to others when their leases lapse: %r", error)
        self.claims.clear()
        for task in self._background:
            task.cancel()
        self.on_stop = None
        super().handle_sig(signum)

    async def _hand_over(self) -> None:
        """Releases every job at once."""
        claims = [claim for job_id, claim in self.claims.items() if job_id not in self._settling]
        if claims:
            await persist(lambda: self.queue.release(self.owner, claims))
        for claim in claims:
            self._drop(claim)

    async def close(self) -> None:
        """Ends the jobs' tasks, then the process's own; Redis may be away."""
        self.handle_sig(signal.SIGTERM)
        assert self._going is not None
        await self._going
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        await self.wakes.aclose()
        if self.on_shutdown:
            await self.on_shutdown(self.ctx)
        await self.pool.aclose()

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
        await self._settle(current_claim.get(), finished=finish)

    async def finish_failed_job(self, job_id: str, result_data: bytes | None) -> None:
        """Seals the stream of a job that arq won't run, then deletes the job."""
        reason = str(msgspec.msgpack.decode(result_data)["r"]) if result_data else "it can't be run"
        error = StreamError(f"The request was not run: {reason}.", code="job_failed")
        if reason.endswith(NOT_THERE):
            error = REQUEST_LOST
        await self._fail(current_claim.get(), error)

    async def _fail(self, claim: Claim, error: StreamError) -> None:
        if self.claims.get(claim.job_id) is not claim:
            return
        terminal = Terminal(f"{self.owner}/{claim.attempt}", error=error)
        await self.queue.streams.seal(claim.job_id, terminal, Writer(claim.job_id, claim.attempt))
        await self._settle(claim, finished=True)

    def _tries_used_up(self) -> StreamError:
        tries = f"{self.deaths_allowed} tries" if self.deaths_allowed > 1 else "one try"
        return StreamError(
            f"The request was given up after {tries}: each time, its worker died.", code="tries_used_up"
        )
