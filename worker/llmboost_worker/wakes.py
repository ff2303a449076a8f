"""Waiting for work: one BLPOP per class of jobs, each on a connection of its own.

A worker that is full of batch jobs waits for interactive ones alone, and one with free slots for both. So
what it waits for changes while a BLPOP is under way. That is never cancelled, for Redis may just have given
it a token, which would then wake nobody: it goes on over any number of calls. A token that comes when its
class is no longer wanted goes back, to wake another worker.
"""

import asyncio
from collections.abc import Sequence

from llmboost.connection import BLOCK_S
from llmboost.jobs import JobClass
from llmboost.queue import JobQueue


class Wakes:
    """The wake tokens of one model, for one worker."""

    def __init__(self, queue: JobQueue, model: str) -> None:
        self._queue = queue
        self._model = model
        self._waiters: dict[JobClass, asyncio.Task[bool]] = {}

    async def wait(self, classes: Sequence[JobClass], slot_freed: asyncio.Event) -> None:
        """Returns when it is worth looking for jobs of these classes: a token has come, or none has for a
        while; or when a slot is free.

        Raises:
            RedisError: Redis can't be asked.
        """
        for each in classes:
            if each not in self._waiters:
                wait = self._queue.wait(self._model, BLOCK_S, (each,))
                self._waiters[each] = asyncio.create_task(wait)
        freed = asyncio.create_task(slot_freed.wait())
        try:
            over = False
            while not over:
                waits = [freed, *self._waiters.values()]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                over = await self._take(classes) or freed.done()
        finally:
            freed.cancel()

    async def _take(self, wanted: Sequence[JobClass]) -> bool:
        """Whether a wait for a class that is wanted has ended; tokens of others go back."""
        ended = [each for each, waiter in self._waiters.items() if waiter.done()]
        results = await asyncio.gather(*(self._waiters.pop(each) for each in ended), return_exceptions=True)
        unwanted = [
            each for each, token in zip(ended, results, strict=True) if token is True and each not in wanted
        ]
        if unwanted:
            await self._queue.wake(self._model, unwanted)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return not set(ended).isdisjoint(wanted)

    async def aclose(self) -> None:
        """Waits for no more. A token that has just come is lost."""
        waiters, self._waiters = list(self._waiters.values()), {}
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
