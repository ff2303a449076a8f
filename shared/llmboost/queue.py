"""The queue: jobs wait here, are claimed under a lease, and go back if the lease lapses.

A job is an arq job (definition under arq's key, id in a sorted set), made event-driven and leased:

- `submit` creates the stream and enqueues the job in one script, and pushes one wake token.
- `claim` takes up to k jobs, interactive before batch, out of the queue and into the leases. A running
  job is in no queue, so a claim costs the same however many run.
- `renew`, `release` and `finish` compare owner and attempt first: a worker that lost its lease changes
  nothing.
- `reclaim` puts jobs whose lease has lapsed back at the head of their queue.
- `reap` seals streams that are open though their deadline has passed or nobody will ever run them.

The queue lives on one Redis primary: these scripts touch keys of several jobs.
"""

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from arq.connections import ArqRedis

from llmboost import entries, keys, streams
from llmboost.connection import BLOCK_S, serialize
from llmboost.entries import StreamError, Terminal
from llmboost.jobs import FUNCTION, GenerationJob, JobClass, OpaqueJob, encode
from llmboost.lua import NOW, Script
from llmboost.streams import SealOutcome, TokenStreams, persist

JOB_CLASSES: tuple[JobClass, ...] = ("interactive", "batch")
WAKE_TOKENS = 1024
"""Tokens kept at most; more than that many workers don't wait at once."""


class QueueFull(Exception):
    """The queue holds as many jobs as it may; `str()` says how many."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in this worker's hands, for as long as it renews the lease."""

    job_id: str
    attempt: int
    score: int
    """arq's score: enqueue time in ms, or less if it was put back at the head."""


# A claim's hash remembers where the job came from: `queue`, `leases`, `wake` (key names) and `score`.
_PUT_BACK = """
local function put_back(id)
  local origin = redis.call('HMGET', KEYS[1] .. id, 'queue', 'leases', 'wake', 'score')
  local queue, leases, wake, score = unpack(origin)
  if not queue then return end
  local head = redis.call('ZRANGE', queue, 0, 0, 'WITHSCORES')[2]
  if head then score = math.min(tonumber(score), tonumber(head) - 1) end
  redis.call('ZREM', leases, id)
  redis.call('HSET', KEYS[1] .. id, 'owner', '')
  redis.call('ZADD', queue, score, id)
  redis.call('LPUSH', wake, 1)
  redis.call('PEXPIRE', wake, 3600000)
end
"""

_SUBMIT = Script(
    NOW
    + """
local stream, job, queue, wake, leases, claim, open, audience = unpack(KEYS)
local id, entry_id, entry, definition, ttl, deadline, grace, max_queued, wake_tokens = unpack(ARGV)
if redis.call('EXISTS', stream) == 1 then return 1 end
if tonumber(max_queued) > 0 and redis.call('ZCARD', queue) >= tonumber(max_queued) then return 0 end
redis.call('XADD', stream, entry_id, 'e', entry)
redis.call('PEXPIRE', stream, ttl)
redis.call('SET', job, definition, 'PX', ttl)
-- To the microsecond: jobs of one millisecond keep their order.
local score = string.format('%d.%03d', now, time[2] % 1000)
redis.call('HSET', claim, 'attempt', 0, 'owner', '', 'score', score,
           'queue', queue, 'leases', leases, 'wake', wake)
redis.call('PEXPIRE', claim, ttl)
redis.call('ZADD', open, deadline, id)
if tonumber(grace) > 0 then redis.call('ZADD', audience, now + grace, id) end
redis.call('ZADD', queue, score, id)
if redis.call('LLEN', wake) < tonumber(wake_tokens) then redis.call('LPUSH', wake, 1) end
redis.call('PEXPIRE', wake, 3600000)
return 1
"""
)

_WAKE = Script("redis.call('LPUSH', KEYS[1], 1) redis.call('PEXPIRE', KEYS[1], 3600000)")

_CLAIM = Script(
    NOW
    + """
local claims, leases = KEYS[1], KEYS[2]
local count, owner, lease = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local taken = {}
for i = 3, #KEYS do
  if count <= 0 then break end
  local queue = KEYS[i]
  local jobs = redis.call('ZRANGE', queue, '-inf', now + 1, 'BYSCORE', 'LIMIT', 0, count, 'WITHSCORES')
  for j = 1, #jobs, 2 do
    local id = jobs[j]
    redis.call('ZREM', queue, id)
    local attempt = redis.call('HINCRBY', claims .. id, 'attempt', 1)
    redis.call('HSET', claims .. id, 'owner', owner)
    -- The hash of a job that expired while it waited has just come back without its TTL.
    if redis.call('PTTL', claims .. id) < 0 then redis.call('PEXPIRE', claims .. id, 3600000) end
    redis.call('ZADD', leases, now + lease, id)
    taken[#taken + 1] = {id, attempt, jobs[j + 1]}
    count = count - 1
  end
end
return taken
"""
)

_MINE = """
local function mine(id, owner, attempt)
  local held_by, held_attempt = unpack(redis.call('HMGET', KEYS[1] .. id, 'owner', 'attempt'))
  return held_by == owner and held_attempt == attempt
end
"""

_RENEW = Script(
    NOW
    + _MINE
    + """
local lost = {}
for i = 3, #ARGV, 2 do
  if mine(ARGV[i], ARGV[1], ARGV[i + 1]) then
    redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
"""
)

_RELEASE = Script(
    _MINE
    + _PUT_BACK
    + """
local id, owner, attempt = unpack(ARGV)
if not mine(id, owner, attempt) then return 0 end
if tonumber(redis.call('GET', KEYS[2]) or 0) > 0 then redis.call('DECR', KEYS[2]) end
put_back(id)
return 1
"""
)

_FINISH = Script(
    _MINE
    + """
local id, owner, attempt = unpack(ARGV)
if not mine(id, owner, attempt) then return 0 end
redis.call('ZREM', KEYS[2], id)
redis.call('DEL', KEYS[1] .. id, KEYS[3], KEYS[4])
return 1
"""
)

_DISCARD = Script("""
local claim, job, retry = unpack(KEYS)
local queue = redis.call('HGET', claim, 'queue')
if not queue or redis.call('ZREM', queue, ARGV[1]) == 0 then return 0 end
redis.call('DEL', claim, job, retry)
return 1
""")

_RECLAIM = Script(
    NOW
    + _PUT_BACK
    + """
local lapsed = redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])
for _, id in ipairs(lapsed) do
  redis.call('ZREM', KEYS[2], id)
  put_back(id)
end
return lapsed
"""
)

_STRANDED = Script(
    NOW
    + """
local open, audience, claims = unpack(KEYS)
redis.call('ZREMRANGEBYSCORE', audience, '-inf', now - 3600000)
local late = redis.call('ZRANGE', open, '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[2])
local cursor, page = unpack(redis.call('ZSCAN', open, ARGV[1], 'COUNT', ARGV[2]))
local orphans = {}
for i = 1, #page, 2 do
  local id = page[i]
  local queue, leases = unpack(redis.call('HMGET', claims .. id, 'queue', 'leases'))
  if not (queue and (redis.call('ZSCORE', queue, id) or redis.call('ZSCORE', leases, id))) then
    orphans[#orphans + 1] = id
  end
end
return {cursor, late, orphans}
"""
)


class JobQueue:
    """The queue of every model, on one Redis server."""

    def __init__(self, redis: ArqRedis, token_streams: TokenStreams) -> None:
        self.redis = redis
        self.streams = token_streams
        self._scan_cursor = 0

    # Whoever asks

    async def submit(
        self, job: GenerationJob, *, audience: float = 0, max_queued: int = 0, form: bytes = b""
    ) -> None:
        """Creates the job's stream and enqueues it; safe to call again after an unknown outcome.

        `audience`: seconds for which the caller promises to read. `max_queued`: 0 is no limit.
        `form`: kept in the stream's first entry, for whoever writes the answer down.

        Raises:
            QueueFull: `max_queued` jobs wait already; nothing was written.
            RedisError: the outcome is not known.
        """
        definition = serialize(
            {"t": None, "f": FUNCTION, "a": (OpaqueJob(encode(job)),), "k": {}, "et": int(job.created * 1000)}
        )
        accepted = await _SUBMIT(
            self.redis,
            [
                keys.stream(job.id),
                keys.arq_job(job.id),
                keys.queue(job.model, job.job_class),
                keys.wake(job.model),
                keys.leases(job.model),
                keys.claim(job.id),
                keys.OPEN,
                keys.AUDIENCE,
            ],
            [
                job.id,
                streams.QUEUED_ID,
                entries.encode(entries.Queued(job.model, job.owner, job.created, form)),
                definition,
                # Outlives the deadline by the retention: the reaper seals in between.
                int((job.deadline - job.created) * 1000) + self.streams.retention_ms,
                int(job.deadline * 1000),
                int(audience * 1000) if job.needs_audience else 0,
                max_queued,
                WAKE_TOKENS,
            ],
        )
        if not accepted:
            raise QueueFull(f"{max_queued} requests for {job.model!r} are waiting already")

    async def cancel(self, job_id: str, terminal: Terminal) -> SealOutcome:
        """Ends a request wherever it is: seals its stream; a running worker learns from its next append."""
        outcome = await self.streams.seal(job_id, terminal)
        await self.discard(job_id)
        return outcome

    async def discard(self, job_id: str) -> bool:
        """Takes a waiting job out of its queue; a claimed one is left to its worker."""
        return bool(
            await _DISCARD(
                self.redis, [keys.claim(job_id), keys.arq_job(job_id), keys.arq_retry(job_id)], [job_id]
            )
        )

    async def depth(self, model: str, job_class: JobClass) -> int:
        """Jobs that wait."""
        return int(await self.redis.zcard(keys.queue(model, job_class)))

    # Workers

    async def wait(self, model: str, seconds: float = BLOCK_S) -> bool:
        """Waits for a wake token; false if none came. Blocks a connection for up to `BLOCK_S`."""
        token = self.redis.blpop([keys.wake(model)], timeout=cast(int, min(seconds, BLOCK_S)))
        return await cast("Awaitable[Any]", token) is not None

    async def wake(self, model: str) -> None:
        """Pushes a wake token, as an enqueue does."""
        await _WAKE(self.redis, [keys.wake(model)], [])

    async def claim(self, model: str, count: int, owner: str, lease: float) -> list[Claim]:
        """Takes up to `count` jobs under a lease (s), oldest first, interactive before batch."""
        taken = await _CLAIM(
            self.redis,
            [keys.claim(""), keys.leases(model), *(keys.queue(model, each) for each in JOB_CLASSES)],
            [count, owner, int(lease * 1000)],
        )
        return [Claim(job_id.decode(), attempt, int(float(score))) for job_id, attempt, score in taken]

    async def renew(self, model: str, owner: str, lease: float, claims: Sequence[Claim]) -> list[str]:
        """Extends the leases; returns the ids of jobs that are no longer this owner's."""
        if not claims:
            return []
        pairs: list[str | int] = [part for claim in claims for part in (claim.job_id, claim.attempt)]
        lost = await _RENEW(
            self.redis, [keys.claim(""), keys.leases(model)], [owner, int(lease * 1000), *pairs]
        )
        return [cast(bytes, job_id).decode() for job_id in lost]

    async def release(self, claim: Claim, owner: str) -> bool:
        """Hands a job back to the head of its queue; costs it no try. False if it was no longer ours."""
        return bool(
            await _RELEASE(
                self.redis,
                [keys.claim(""), keys.arq_retry(claim.job_id)],
                [claim.job_id, owner, claim.attempt],
            )
        )

    async def finish(self, model: str, claim: Claim, owner: str) -> bool:
        """Deletes a job that has ended; its stream stays. False if it was no longer ours."""
        return bool(
            await _FINISH(
                self.redis,
                [
                    keys.claim(""),
                    keys.leases(model),
                    keys.arq_job(claim.job_id),
                    keys.arq_retry(claim.job_id),
                ],
                [claim.job_id, owner, claim.attempt],
            )
        )

    async def reclaim(self, model: str, count: int = 100) -> list[str]:
        """Puts jobs whose lease has lapsed back at the head of their queue; returns their ids."""
        lapsed = await _RECLAIM(self.redis, [keys.claim(""), keys.leases(model)], [count])
        return [cast(bytes, job_id).decode() for job_id in lapsed]

    # Reaping: any process may, and several at once do no harm

    async def reap(self, by: str, count: int = 100) -> int:
        """Seals streams whose deadline has passed, and open ones that no queue and no lease holds.

        Returns how many. One call looks at about `count` streams and the next goes on from there.
        """
        late, orphans = await self._stranded(count)
        for job_id in late:
            await self.cancel(job_id, Terminal(by, error=DEADLINE_ERROR))
        for job_id in orphans:
            await self.streams.seal(job_id, Terminal(by, error=ORPHAN_ERROR))
        return len(late) + len(orphans)

    async def _stranded(self, count: int) -> tuple[list[str], list[str]]:
        async def scan() -> Any:
            return await _STRANDED(
                self.redis, [keys.OPEN, keys.AUDIENCE, keys.claim("")], [self._scan_cursor, count]
            )

        cursor, late, orphans = await persist(scan)
        self._scan_cursor = int(cursor)
        overdue = {cast(bytes, job_id).decode() for job_id in late}
        return sorted(overdue), [job_id for job_id in map(bytes.decode, orphans) if job_id not in overdue]


DEADLINE_ERROR = StreamError(
    "The request's time limit passed before it was answered. Ask for fewer tokens, "
    "or have the operator raise --request-timeout.",
    type="timeout_error",
    code="request_timeout",
    status=504,
)
ORPHAN_ERROR = StreamError(
    "The request was lost before it was answered. Send it again.", code="request_lost", status=500
)
