"""An index: ids by the time (µs) of their making, in a sorted set; read page by page."""

from collections.abc import AsyncIterator

from redis.asyncio import Redis

from llmboost.jobs import made_at

ADD_TO_INDEX = """
local function add_to_index(index, id)
  local time = redis.call('TIME')
  local at = time[1] * 1000000 + time[2]
  local newest = tonumber(redis.call('ZRANGE', index, -1, -1, 'WITHSCORES')[2] or 0)
  -- No two at one time, or a page that ends between them would leave one out.
  redis.call('ZADD', index, 'NX', string.format('%.0f', math.max(at, newest + 1)), id)
end
"""
"""Lua prelude: `add_to_index` adds an id, unless it is there."""


async def pages(
    redis: Redis, index: str, *, after: str | None, newest_first: bool, size: int
) -> AsyncIterator[list[str]]:
    """All ids in the order of their making, from behind the id `after`, up to `size` at a time.

    Raises:
        ValueError: `after` is no id that was made here.
    """
    read = redis.zrevrangebyscore if newest_first else redis.zrangebyscore
    start = await _behind(redis, index, after, newest_first=newest_first)
    end = "-inf" if newest_first else "+inf"
    while page := await read(index, start, end, start=0, num=size, withscores=True):
        yield [each.decode() for each, _ in page]
        start = f"({page[-1][1]:.0f}"


async def _behind(redis: Redis, index: str, after: str | None, *, newest_first: bool) -> str:
    if after is None:
        return "+inf" if newest_first else "-inf"
    score = await redis.zscore(index, after)
    if score is not None:
        return f"({score:.0f}"
    # It is long gone. Its id still says when it was made, to the second.
    made = made_at(after)
    if made is None:
        raise ValueError(f"{after!r} is no id that was made here")
    return f"({(made + newest_first) * 1e6:.0f}"
