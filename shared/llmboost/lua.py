"""Redis scripts: each one is a `Script`, called from exactly one typed Python function.

A script is the unit of atomicity here, so every rule that must not be interleaved lives in one. They
read the server's clock (`TIME`), never a caller's: hosts need not agree on the time.
"""

import hashlib
from collections.abc import Awaitable, Sequence
from typing import Any, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

Value = str | bytes | int | float

NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
"""Lua prelude: `now`, the server's time in ms."""

ENQUEUE_ARQ = """
local function enqueue_arq(key, queue, id, definition)
  redis.call('SET', key, definition, 'PX', 86400000)
  redis.call('ZADD', queue, now, id)
end
"""
"""Lua prelude, after `NOW`: enqueues an `entries.ArqJob`; `key` is `keys.arq_job` of its id."""


class Script:
    """A Lua source, sent once per server and afterwards named by its hash."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, redis: Redis, keys: Sequence[str], args: Sequence[Value]) -> Any:
        """Runs it in one round trip (two on a server that has not seen it)."""
        parameters = cast("list[str]", [*keys, *args])
        try:
            return await cast("Awaitable[Any]", redis.evalsha(self.sha, len(keys), *parameters))
        except NoScriptError:
            return await cast("Awaitable[Any]", redis.eval(self.source, len(keys), *parameters))
