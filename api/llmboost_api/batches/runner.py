"""The batch runner of a pod: takes batches that nobody holds, and runs a few at a time."""

import asyncio
import logging
import random
from contextlib import suppress
from types import TracebackType

from fastapi import Request

from llmboost.streams import persist
from llmboost_api.batches.execution import Execution
from llmboost_api.batches.holding import claim
from llmboost_api.batches.store import BatchStore
from llmboost_api.pod import Pod

logger = logging.getLogger(__name__)

AT_ONCE = 16
"""Batches that one pod runs. Their lines wait in one queue, in the order in which they were begun: so batches
that run at the same time share the workers evenly."""
LOOK_EVERY_S = 1.0


class BatchRunner:
    """An async context manager: while it is entered it runs batches, if its pod is to run any. Lives on while
    Redis is away."""

    def __init__(self, pod: Pod) -> None:
        self.store = BatchStore(pod.redis, pod.settings.response_ttl)
        self._pod = pod
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "BatchRunner":
        if self._pod.settings.batch_runner:
            self._loop = asyncio.create_task(self._claim_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def wake(self) -> None:
        """There may be a new batch: looks for it now."""
        self._wake.set()

    async def stop(self) -> None:
        """Commits what there is and hands every batch over, within `HAND_OVER_S`."""
        tasks = [*self._running, *([self._loop] if self._loop else ())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._loop = None

    async def _claim_forever(self) -> None:
        while True:
            try:
                await self._claim()
            except Exception:  # a defect here must not end what every batch waits for
                logger.exception("can't claim batches")
            # Jitter: several pods look.
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S * random.uniform(0.5, 1.5)):
                    await self._wake.wait()
            self._wake.clear()

    async def _claim(self) -> None:
        room = AT_ONCE - len(self._running)
        if room <= 0:
            return
        for holding in await persist(lambda: claim(self._pod.redis, self._pod.id, room)):
            logger.info("batch claimed: batch=%s attempt=%d", holding.id, holding.attempt)
            task = asyncio.create_task(Execution(self._pod, holding).run())
            self._running.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a batch's task failed", exc_info=error)
        self._wake.set()  # There is room for another.


def runner_of(request: Request) -> BatchRunner:
    """The runner of the pod that serves this request."""
    runner: BatchRunner = request.app.state.batch_runner
    return runner
