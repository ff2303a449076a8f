"""Conditions instead of sleeps."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from inspect import CORO_SUSPENDED, getcoroutinestate
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_until(
    condition: Callable[[], T | Awaitable[T]], *, within: float = 10.0, every: float = 0.005
) -> T:
    """Polls until `condition()` is true and returns its value; fails, naming it, after `within` seconds."""
    deadline = time.monotonic() + within
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not true within {within} s: {inspect.getsource(condition).strip()}")
        await asyncio.sleep(every)


async def suspended(*tasks: "asyncio.Task[Any]") -> None:
    """Returns once each of them has begun and waits for something."""
    for task in tasks:
        await wait_until(lambda task=task: getcoroutinestate(task.get_coro()) == CORO_SUSPENDED)
