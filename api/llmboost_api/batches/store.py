"""Batches in Redis, as clients deal with them: made, looked at, listed, cancelled.

`holding` is how runners deal with them.
"""

from redis.asyncio import Redis

from llmboost import keys
from llmboost.entries import Once
from llmboost.jobs import made_at
from llmboost.lua import NOW, Script
from llmboost.queue import SubmittedBefore
from llmboost_api.batches.record import Batch, BatchRecord, hash_of
from llmboost_api.protocol.batches import LONGEST_S

SLACK_S = 7 * 86400.0
"""For so long after its window a batch may still be without a runner and not be forgotten."""

_CREATE = Script(
    NOW
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
local at = time[1] * 1000000 + time[2]
local newest = tonumber(redis.call('ZRANGE', index, -1, -1, 'WITHSCORES')[2] or 0)
-- No two at one time, or a page that ends between them would leave one out.
redis.call('ZADD', index, string.format('%.0f', math.max(at, newest + 1)), id)
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
        there are more."""
        index = keys.batches(owner)
        top = await self._behind(index, after)
        found: list[Batch] = []
        while True:
            page = await self.redis.zrevrangebyscore(
                index, top, "-inf", start=0, num=limit + 1, withscores=True
            )
            if not page:
                return found, False
            async with self.redis.pipeline(transaction=False) as pipe:
                for batch_id, _ in page:
                    pipe.hgetall(keys.batch(batch_id.decode()))
                batches = map(Batch.of, await pipe.execute())
            for batch in batches:
                if batch is None:  # its time is over; the index is pruned later
                    continue
                if len(found) == limit:
                    return found, True
                found.append(batch)
            top = f"({page[-1][1]:.0f}"

    async def _behind(self, index: str, after: str | None) -> str:
        if after is None:
            return "+inf"
        score = await self.redis.zscore(index, after)
        if score is None:  # It is long gone. Its id still says when it was made, to the second.
            score = ((made_at(after) or 0.0) + 1) * 1e6
        return f"({score:.0f}"
