"""Batches in Redis, as clients deal with them: made, looked at, listed, cancelled.

`holding` is how runners deal with them.
"""

from redis.asyncio import Redis

from llmboost import keys
from llmboost.entries import Once
from llmboost.lua import NOW, Script
from llmboost.queue import SubmittedBefore
from llmboost_api.batches.record import Batch, BatchRecord, hash_of
from llmboost_api.index import ADD_TO_INDEX, pages
from llmboost_api.protocol.batches import LONGEST_S

SLACK_S = 7 * 86400.0
"""For so long after its window a batch may still be without a runner and not be forgotten."""

_CREATE = Script(
    ADD_TO_INDEX
    + NOW
    + """
local batch, waiting, index, once = unpack(KEYS)
local id, record, ttl, before, name = unpack(ARGV)
if redis.call('EXISTS', batch) == 1 then return end
if once then
  local taken = redis.call('GET', once)
  if taken then return taken end
  redis.call('SET', once, name, 'PX', ttl)
  redis.call('HSET', batch, 'once', once)
end
redis.call('HSET', batch, 'record', record, 'status', 'validating')
redis.call('PEXPIRE', batch, ttl)
redis.call('ZADD', waiting, now, id)
redis.call('ZREMRANGEBYSCORE', index, '-inf', before)
add_to_index(index, id)
if redis.call('PTTL', index) < tonumber(ttl) then redis.call('PEXPIRE', index, ttl) end
"""
)

_CANCEL = Script(
    NOW
    + """
local status = redis.call('HGET', KEYS[1], 'status')
if status == 'validating' or status == 'in_progress' then
  status = 'cancelling'
  redis.call('HSET', KEYS[1], 'status', status, 'cancelling_at', math.floor(now / 1000))
end
return status
"""
)


class BatchStore:
    """Batches of all owners, on one Redis server. Every call may be sent again if its outcome is unknown."""

    def __init__(self, redis: Redis, ttl: float) -> None:
        """`ttl`: seconds that a batch is kept after its end."""
        self.redis = redis
        self.ttl = ttl

    async def create(self, record: BatchRecord, once: Once | None) -> None:
        """Makes a batch, for a runner to take.

        Raises:
            SubmittedBefore: by the name `once`.
        """
        lasts = record.deadline - record.created + self.ttl + SLACK_S
        oldest = record.created - LONGEST_S - self.ttl - SLACK_S
        taken = await _CREATE(
            self.redis,
            [
                keys.batch(record.id),
                keys.BATCHES,
                keys.batches(record.owner),
                *([once.key] if once else ()),
            ],
            [record.id, record.encode(), int(lasts * 1000), int(oldest * 1e6), once.value if once else b""],
        )
        if taken is not None:
            raise SubmittedBefore(taken)

    async def created_before(self, once: Once) -> bytes | None:
        """What the name stands for, if a batch was made under it."""
        value: bytes | None = await self.redis.get(once.key)
        return value

    async def get(self, batch_id: str) -> Batch | None:
        """A batch of any owner; None if there is none (any more)."""
        return Batch.of(await hash_of(self.redis, batch_id))

    async def cancel(self, batch_id: str) -> str | None:
        """Has a runner end it, unless nothing is left to run; returns its status, None if it is gone."""
        status: bytes | None = await _CANCEL(self.redis, [keys.batch(batch_id)], [])
        return None if status is None else status.decode()

    async def page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Batch], bool]:
        """Up to `limit` of the owner's batches, newest first, from behind the batch `after`; and whether
        there are more.

        Raises:
            ValueError: `after` is no id that was made here.
        """
        index = keys.batches(owner)
        found: list[Batch] = []
        async for ids in pages(self.redis, index, after=after, newest_first=True, size=limit + 1):
            async with self.redis.pipeline(transaction=False) as pipe:
                for batch_id in ids:
                    pipe.hgetall(keys.batch(batch_id))
                batches = map(Batch.of, await pipe.execute())
            for batch in batches:
                if batch is None:  # its time is over; the index is pruned later
                    continue
                if len(found) == limit:
                    return found, True
                found.append(batch)
        return found, False
