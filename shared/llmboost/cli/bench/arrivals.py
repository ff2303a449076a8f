"""When requests are sent: so many at a time, or so many a second."""

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

Send = Callable[[int], Coroutine[Any, Any, None]]
"""Sends the request of a number and returns when it has ended."""


class Limit:
    """How many requests there are, or until when they are sent."""

    def __init__(self, requests: int | None, seconds: float | None) -> None:
        self._numbers = itertools.count() if requests is None else iter(range(requests))
        self._seconds = seconds
        self._ends = float("inf")

    def begin(self) -> None:
        """The time begins."""
        if self._seconds is not None:
            self._ends = time.perf_counter() + self._seconds

    def next(self, at: float) -> int | None:
        """The number of a request that is sent then; None: there is none any more."""
        return next(self._numbers, None) if at < self._ends else None


async def at_a_time(concurrency: int, limit: Limit, send: Send) -> None:
    """Keeps `concurrency` requests running: a new one when one has ended."""

    async def one_after_another() -> None:
        while (number := limit.next(time.perf_counter())) is not None:
            await send(number)

    limit.begin()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(concurrency):
            tasks.create_task(one_after_another())


async def at_a_rate(rate: float, burstiness: float, seed: str, limit: Limit, send: Send) -> list[float]:
    """Sends `rate` requests a second on average, whether or not others have ended.

    Returns how late each was sent, in seconds: the generator's own fault.
    """
    late: list[float] = []
    limit.begin()
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for at in times(rate, burstiness, seed):
            if (number := limit.next(began + at)) is None:
                break
            await asyncio.sleep(began + at - time.perf_counter())
            late.append(time.perf_counter() - began - at)
            tasks.create_task(send(number))
    return late


def times(rate: float, burstiness: float, seed: str) -> Iterator[float]:
    """Seconds after the beginning: gaps are of a gamma distribution of this shape, 1 is Poisson's."""
    draw, at = random.Random(f"{seed} times"), 0.0
    while True:
        yield at
        at += draw.gammavariate(burstiness, 1 / (rate * burstiness))
