"""Stored answers: what is kept of them beside their token streams, which hold the answers themselves."""

from collections.abc import Awaitable
from typing import Any, cast

import msgspec
from redis.asyncio import Redis

from llmboost import keys
from llmboost.jobs import made_at, now
from llmboost.lua import Script

_DELETED = b""
"""In a record's place: it was deleted, and is not merely gone."""

_REPLACE = Script("""
local before = redis.call('GET', KEYS[1])
if not before or before == '' then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'KEEPTTL')
return 1
""")


class StoredAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a stored answer was asked with."""

    owner: str
    model: str
    """As it was asked for."""
    metadata: dict[str, str] = {}
    input: list[dict[str, Any]] = []
    """The messages, or items, of this request."""
    history: list[dict[str, Any]] = []
    """Those of the turns before it."""


class StoredAnswers:
    """Records by completion id, and each API key's list of chat completions; on one Redis server."""

    def __init__(self, redis: Redis, ttl: float) -> None:
        """`ttl`: seconds that an answer is kept after its end."""
        self.redis = redis
        self.ttl = ttl

    async def put(self, completion_id: str, answer: StoredAnswer, lasts: float, *, listed: bool) -> None:
        """Keeps a record for the seconds that the answer takes at most, and the time to live after that.

        `listed`: it is found by `ids`, too. What is there already stays as it is.
        """
        ttl_ms = int((lasts + self.ttl) * 1000)
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.set(keys.stored(completion_id), _encode(answer), px=ttl_ms, nx=True)
            if listed:
                index = keys.stored_by(answer.owner)
                made = int(now() * 1000)
                pipe.zadd(index, {completion_id: made}, nx=True)
                pipe.zremrangebyscore(index, "-inf", made - ttl_ms)
                pipe.pexpire(index, ttl_ms)
            await pipe.execute()

    async def get(self, completion_id: str) -> StoredAnswer | None:
        """The record; None if there is none (any more)."""
        return (await self.get_all([completion_id]))[0]

    async def get_all(self, completion_ids: list[str]) -> list[StoredAnswer | None]:
        """The record of each id."""
        if not completion_ids:
            return []
        raw = await self.redis.mget([keys.stored(each) for each in completion_ids])
        return [_decode(each) if each else None for each in raw]

    async def replace(self, completion_id: str, answer: StoredAnswer) -> bool:
        """Changes a record, not its time to live. False if it is gone."""
        return bool(await _REPLACE(self.redis, [keys.stored(completion_id)], [_encode(answer)]))

    async def delete(self, completion_id: str, owner: str) -> None:
        """Forgets a record, and remembers that it was deleted for as long as it would have been kept."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.set(keys.stored(completion_id), _DELETED, px=int(self.ttl * 1000))
            pipe.zrem(keys.stored_by(owner), completion_id)
            await pipe.execute()

    async def discard(self, completion_id: str, owner: str) -> None:
        """Takes back what was put for a request that was not accepted."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.stored(completion_id))
            pipe.zrem(keys.stored_by(owner), completion_id)
            await pipe.execute()

    async def was_deleted(self, completion_id: str) -> bool:
        """Whether somebody deleted it."""
        return bool(await self.redis.get(keys.stored(completion_id)) == _DELETED)

    async def ids(self, owner: str, *, after: str | None, count: int, descending: bool) -> list[str]:
        """Ids of an API key's chat completions oldest or newest first, from behind `after`."""
        index = keys.stored_by(owner)
        start = 0 if after is None else await self._place_behind(index, after, descending)
        page = await self.redis.zrange(index, start, start + count - 1, desc=descending)
        return [each.decode() for each in page]

    async def _place_behind(self, index: str, after: str, descending: bool) -> int:
        find = self.redis.zrevrank if descending else self.redis.zrank
        rank = await cast("Awaitable[int | None]", find(index, after))
        if rank is not None:
            return rank + 1
        # Gone meanwhile: whoever deletes what he lists goes on, from the second in which it was made.
        second = int((made_at(after) or 0) * 1000)
        beyond = (f"({second + 999}", "+inf") if descending else ("-inf", f"({second}")
        return int(await self.redis.zcount(index, *beyond))


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StoredAnswer).decode
