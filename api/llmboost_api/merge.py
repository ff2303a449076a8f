"""Several streams of one completion, read as one."""

import asyncio

from llmboost.entries import ReadEntry
from llmboost.tailer import Subscription
from llmboost_api.tasks import discard

Step = tuple[int, list[ReadEntry]]
"""(index of the job, entries of its stream that came together)."""


class Merge:
    """Several subscriptions as one; nothing is lost when a wait for the next step is cancelled."""

    def __init__(self) -> None:
        self._subscriptions: list[Subscription] = []
        self._pending: dict[asyncio.Task[list[ReadEntry] | None], int] | None = None

    def add(self, subscription: Subscription) -> None:
        self._subscriptions.append(subscription)

    async def next(self) -> Step:
        """Raises `StopAsyncIteration` when all have ended."""
        if len(self._subscriptions) == 1:  # nearly every request: no task per step
            return 0, await anext(self._subscriptions[0])
        if self._pending is None:
            self._pending = {}
            for index in range(len(self._subscriptions)):
                self._wait_for(index)
        while self._pending:
            done, _ = await asyncio.wait(self._pending, return_when=asyncio.FIRST_COMPLETED)
            task = done.pop()
            index = self._pending.pop(task)
            batch = task.result()
            if batch is not None:
                self._wait_for(index)
                return index, batch
        raise StopAsyncIteration

    def _wait_for(self, index: int) -> None:
        async def batch_or_none() -> list[ReadEntry] | None:
            return await anext(self._subscriptions[index], None)

        assert self._pending is not None
        self._pending[asyncio.create_task(batch_or_none())] = index

    async def aclose(self) -> None:
        for task in self._pending or ():
            await discard(task)
