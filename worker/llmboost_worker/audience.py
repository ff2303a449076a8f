"""Ends generations that nobody reads: the client has gone, its pod has died, or a network lies between.

Every reader promises, through its pod, to be there for a grace period and renews the promise; when the
last promise has lapsed, the stream is sealed and the slots are free.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from llmboost.audience import NOBODY_READS
from llmboost.entries import Terminal
from llmboost.jobs import GenerationJob
from llmboost.streams import StreamSealed, TokenStreams

logger = logging.getLogger(__name__)


class AudienceWatch:
    """Looks at all running jobs of one worker, in one command per round."""

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
        self._trusted_at = 0.0
        """Monotonic time from which a lapsed promise means that the reader has gone: while Redis was away,
        pods could renew nothing."""

    async def run(self) -> None:
        """Watches for as long as the worker runs."""
        while True:
            try:
                pause = await self.check()
            except (RedisError, OSError) as error:
                logger.warning("the audience can't be read: %s", error)
                self._trusted_at = time.monotonic() + self._grace
                pause = self._grace / 10
            await asyncio.sleep(pause)

    async def check(self) -> float:
        """Seals the streams that nobody reads; returns the seconds until it is worth looking again."""
        pause = self._grace / 10
        jobs = [job.id for job in self._running() if job.needs_audience]
        asked_at = time.monotonic()
        remaining = await self._streams.audience(jobs)
        if time.monotonic() - asked_at > self._grace / 5:
            self._trusted_at = time.monotonic() + self._grace
        for job_id, seconds in zip(jobs, remaining, strict=True):
            if seconds > 0:
                pause = min(pause, seconds + 0.001)  # exactly when the promise lapses
            elif time.monotonic() >= self._trusted_at:
                await self._streams.seal(job_id, Terminal(self._worker, error=NOBODY_READS))
                self._end(job_id, StreamSealed(f"{job_id}: nobody reads it any more"))
        return pause
