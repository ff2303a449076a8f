"""Ends generations that nobody reads: the client has gone, its pod has died, or a network lies between.

Every reader promises, through its pod, to be there for a grace period and renews the promise; when the
last promise has lapsed, the stream is sealed and the slots are free.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from redis.exceptions import RedisError

from llmboost.audience import NOBODY_READS
from llmboost.entries import Terminal
from llmboost.jobs import GenerationJob
from llmboost.streams import StreamSealed, TokenStreams

logger = logging.getLogger(__name__)


class AudienceWatch:
    """Looks at all running jobs of one worker, in one command per round, and at a new one when it comes: of
    what clients have asked for and left, a long queue must not cost a round each."""

    def __init__(
        self,
        streams: TokenStreams,
        grace: float,
        worker: str,
        running: Callable[[], list[GenerationJob]],
        end: Callable[[str, StreamSealed], None],
    ) -> None:
        self._streams = streams
        self._grace = grace
        self._worker = worker
        self._running = running
        self._end = end
        self._new: list[str] = []
        """Ids of jobs that came since the last round and need an audience."""
        self._has_new = asyncio.Event()
        self._trusted_at = 0.0
        """Monotonic time from which a lapsed promise means that the reader has gone: while Redis was away, or
        the whole machine stood still, pods could renew nothing."""

    def add(self, job: GenerationJob) -> None:
        """A job has been claimed."""
        if job.needs_audience:
            self._new.append(job.id)
            self._has_new.set()

    async def run(self) -> None:
        """Watches for as long as the worker runs."""
        loop = asyncio.get_running_loop()
        next_round = loop.time()
        while True:
            try:
                if loop.time() > next_round + self._grace / 5:
                    self._distrust()  # this process stood still, and perhaps others did
                if loop.time() >= next_round:
                    next_round = loop.time() + await self.check()
                else:
                    next_round = min(next_round, loop.time() + await self._check_new())
            except (RedisError, OSError) as error:
                logger.warning("the audience can't be read: %s", error)
                self._distrust()
                next_round = loop.time() + self._grace / 10
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_round):
                    await self._has_new.wait()

    async def check(self) -> float:
        """Seals the streams that nobody reads; returns the seconds until it is worth looking again."""
        return await self._look_at([job.id for job in self._running() if job.needs_audience])

    async def _check_new(self) -> float:
        new, self._new = self._new, []
        self._has_new.clear()
        return await self._look_at(new)

    async def _look_at(self, jobs: list[str]) -> float:
        pause = self._grace / 10
        asked_at = time.monotonic()
        remaining = await self._streams.audience(jobs)
        if time.monotonic() - asked_at > self._grace / 5:
            self._distrust()
        for job_id, seconds in zip(jobs, remaining, strict=True):
            if seconds > 0:
                pause = min(pause, seconds + 0.001)  # exactly when the promise lapses
            elif time.monotonic() >= self._trusted_at:
                await self._streams.seal(job_id, Terminal(self._worker, error=NOBODY_READS))
                self._end(job_id, StreamSealed(f"{job_id}: nobody reads it any more"))
        return pause

    def _distrust(self) -> None:
        self._trusted_at = time.monotonic() + self._grace
