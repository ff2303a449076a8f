"""Redis as a request asks it: again while it is away, but not for ever."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from redis.exceptions import RedisError

from llmboost.streams import is_passing, persist
from llmboost_api.errors import ApiError, unavailable

PATIENCE_S = 3.0
"""How long a request waits for Redis to come back before it gets 503."""

T = TypeVar("T")


async def answered(ask: Callable[[], Awaitable[T]]) -> T:
    """What Redis answers, if it does so while a request may wait.

    Raises:
        ApiError: it can't be asked (503).
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await persist(ask)
    except (TimeoutError, RedisError, OSError) as error:
        raise no_redis(error) from error


def no_redis(error: BaseException) -> ApiError:
    """Redis could not be asked, and nothing was enqueued."""
    if isinstance(error, RedisError) and not is_passing(error):
        return unavailable("The queue refused the request. Try again, or tell the operator.")
    return unavailable("The queue can't be reached at the moment. Try again in a few seconds.")
