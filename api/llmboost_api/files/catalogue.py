"""Records of files, in Redis: who has which, and what is to be removed when.

A file's bytes and its record can't change together, so whoever makes bytes says first when they are to go
(`reserve`), and its record changes that (`publish`): whoever dies in between, a sweep finds what is left.
"""

from collections.abc import AsyncIterator

from redis.asyncio import Redis

from llmboost import keys
from llmboost.lua import NOW, Script, Value
from llmboost_api.files.record import FileRecord, decode, encode
from llmboost_api.index import ADD_TO_INDEX, pages

RESERVED_S = 6 * 3600.0
"""How long bytes without a record are left alone; renewed while they are being written."""
PAGE = 500
"""Records in one round trip."""
SWEPT_AT_ONCE = 100
PLACE_KEPT_S = 3600.0
"""How long a deleted file's id still names a place in the list of files."""

PUBLISH_FILE = (
    ADD_TO_INDEX
    + """
local function publish_file(record, index, due, id, member, value, expires)
  -- It had a record, which was deleted: whoever asks again, not knowing that it was heard, comes too late.
  if redis.call('ZSCORE', index, id) and redis.call('EXISTS', record) == 0 then return end
  redis.call('SET', record, value)
  add_to_index(index, id)
  if tonumber(expires) > 0 then
    redis.call('PEXPIREAT', record, expires)
    redis.call('ZADD', due, expires, member)
  else
    redis.call('ZREM', due, member)
  end
end
"""
)
"""Lua prelude: `publish_file` takes `publication`'s keys and arguments, for a script that makes a file known
together with something else. May be called again for the same record, and brings no deleted file back."""


def publication(record: FileRecord) -> tuple[list[str], list[Value]]:
    """Keys (3) and arguments (4) of `publish_file`, in its order."""
    expires_ms = 0 if record.expires_at is None else record.expires_at * 1000
    return (
        [keys.file(record.id), keys.files(record.owner), keys.FILES_DUE],
        [record.id, _member(record.owner, record.id), encode(record), expires_ms],
    )


_PUBLISH = Script(PUBLISH_FILE + "publish_file(KEYS[1], KEYS[2], KEYS[3], unpack(ARGV))")

_RESERVE = Script(NOW + "redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])")

_REMOVE = Script(
    NOW
    + """
if redis.call('DEL', KEYS[1]) == 1 then redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1]) end
"""
)

_REMOVE_DUE = Script(
    NOW
    + """
local record, index, due = unpack(KEYS)
local id, member = unpack(ARGV)
local at = redis.call('ZSCORE', due, member)
if not at or tonumber(at) > now then return 0 end
redis.call('DEL', record)
redis.call('ZREM', index, id)
return 1
"""
)

_DUE = Script(NOW + "return redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])")


class Catalogue:
    """Records of files, on one Redis server. Every call may be sent again if its outcome is unknown."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis

    async def reserve(self, owner: str, file_id: str) -> None:
        """Says that bytes are being written which, without a record, go in `RESERVED_S` seconds."""
        await _RESERVE(self.redis, [keys.FILES_DUE], [_member(owner, file_id), int(RESERVED_S * 1000)])

    async def publish(self, record: FileRecord) -> None:
        """Makes a file known, whose bytes are in the storage."""
        await _PUBLISH(self.redis, *publication(record))

    async def get(self, owner: str, file_id: str) -> FileRecord | None:
        """The record of a file; None if this owner has no such file."""
        value = await self.redis.get(keys.file(file_id))
        if value is None:
            return None
        record = decode(value)
        return record if record.owner == owner else None

    async def remove(self, record: FileRecord) -> None:
        """Makes a file unknown, if it is known. Its bytes are then to be removed.

        Its place in the index is kept for a while, for whoever pages through the files and deletes them.
        """
        await _REMOVE(
            self.redis,
            [keys.file(record.id), keys.FILES_DUE],
            [_member(record.owner, record.id), int(PLACE_KEPT_S * 1000)],
        )

    async def remove_due(self) -> list[tuple[str, str]]:
        """Makes unknown what is to go by now: (owner, file id) of up to `SWEPT_AT_ONCE` files whose bytes are
        to be removed, and `forget` called."""
        removed = []
        for member in await _DUE(self.redis, [keys.FILES_DUE], [SWEPT_AT_ONCE]):
            owner, _, file_id = member.decode().rpartition(":")
            if await self._remove_due(owner, file_id):
                removed.append((owner, file_id))
        return removed

    async def _remove_due(self, owner: str, file_id: str) -> bool:
        """Only if it is to go still: it may have got a record meanwhile."""
        removed = await _REMOVE_DUE(
            self.redis,
            [keys.file(file_id), keys.files(owner), keys.FILES_DUE],
            [file_id, _member(owner, file_id)],
        )
        return bool(removed)

    async def forget(self, owner: str, file_id: str) -> None:
        """The bytes are gone: there is nothing left to be removed."""
        await self.redis.zrem(keys.FILES_DUE, _member(owner, file_id))

    async def walk(self, owner: str, *, after: str | None, newest_first: bool) -> AsyncIterator[FileRecord]:
        """All records of an owner, by the time of their making, from behind the file `after`.

        Raises:
            ValueError: `after` is no id of a file.
        """
        index = keys.files(owner)
        async for ids in pages(self.redis, index, after=after, newest_first=newest_first, size=PAGE):
            for value in await self.redis.mget([keys.file(each) for each in ids]):
                if value is not None:
                    yield decode(value)


def _member(owner: str, file_id: str) -> str:
    return f"{owner}:{file_id}"
