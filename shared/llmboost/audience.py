"""The audience of streams: until when somebody has promised to read each of them.

A stream whose last promise has lapsed is of use to nobody: whoever runs it ends it, unless its job needs no
audience.
"""

from collections.abc import Sequence
from typing import Any, cast

from redis.asyncio import Redis

from llmboost import keys
from llmboost.entries import CANCELLED_TYPE, StreamError
from llmboost.lua import NOW, Script

NOBODY_READS = StreamError(
    "The request was cancelled: nobody was reading its stream.",
    CANCELLED_TYPE,
    "client_gone",
    status=499,
)
"""In which the stream then ends."""

_RENEW_AUDIENCE = Script(
    NOW
    + """
local missing = {}
for i = 2, #ARGV do
  local id = ARGV[i]
  if redis.call('EXISTS', KEYS[i + 1]) == 0 then
    missing[#missing + 1] = id
  elseif redis.call('ZSCORE', KEYS[2], id) then
    redis.call('ZADD', KEYS[1], 'GT', now + ARGV[1], id)
  end
end
return missing
"""
)

_SHORTEN_AUDIENCE = Script(
    NOW
    + """
for i = 2, #ARGV do redis.call('ZADD', KEYS[1], 'XX', 'LT', now + ARGV[1], ARGV[i]) end
"""
)

_AUDIENCE = Script(
    NOW
    + """
local scores = redis.call('ZMSCORE', KEYS[1], unpack(ARGV))
for i, score in ipairs(scores) do
  if score then scores[i] = tonumber(score) - now else scores[i] = -1 end
end
return scores
"""
)


class Audience:
    """What readers promise, and what workers see of it."""

    redis: Redis

    async def renew_audience(self, job_ids: Sequence[str], seconds: float) -> list[str]:
        """Says that each stream has a reader for so long; returns the ids of streams that no longer exist."""
        if not job_ids:
            return []
        missing = await _RENEW_AUDIENCE(
            self.redis,
            [keys.AUDIENCE, keys.OPEN, *map(keys.stream, job_ids)],
            [int(seconds * 1000), *job_ids],
        )
        return [cast(bytes, job_id).decode() for job_id in missing]

    async def shorten_audience(self, job_ids: Sequence[str], seconds: float) -> None:
        """Takes back what was promised beyond so many seconds: a reader has left. Another one's next renewal
        makes up for it."""
        if job_ids:
            await _SHORTEN_AUDIENCE(self.redis, [keys.AUDIENCE], [int(seconds * 1000), *job_ids])

    async def audience(self, job_ids: Sequence[str]) -> list[float]:
        """Per id, the seconds for which a reader is still promised; negative if the promise has lapsed."""
        if not job_ids:
            return []
        remaining: list[Any] = await _AUDIENCE(self.redis, [keys.AUDIENCE], list(job_ids))
        return [ms / 1000 for ms in remaining]
