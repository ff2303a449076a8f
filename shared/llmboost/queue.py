"""The queue: jobs wait here, are claimed under a lease, and go back if the lease lapses.

A job is an arq job (definition under arq's key, id in a sorted set), made event-driven and leased:

- `submit` creates the stream and enqueues the job in one script, and pushes one wake token.
- `claim` takes up to k jobs, interactive before batch, out of the queue and into the leases. A running
  job is in no queue, so a claim costs the same however many run.
- `renew`, `release`, `finish` and `reclaim` are a lease's life (`llmboost.leases`).
- `reap` seals streams that are open though their deadline has passed or nobody will ever run them.

The queue lives on one Redis primary: these scripts touch keys of several jobs.
"""

from dataclasses import replace
from typing import Any, cast

from arq.connections import ArqRedis

from llmboost import entries, keys, streams
from llmboost.connection import serialize
from llmboost.entries import NO_FOLLOW_UP, REQUEST_LOST, FollowUp, Once, StreamError, Terminal
from llmboost.jobs import FUNCTION, GenerationJob, JobClass, OpaqueJob, encode
from llmboost.leases import PUSH, LeasedJobs
from llmboost.lua import NOW, Script
from llmboost.streams import SealOutcome, TokenStreams, persist


class QueueFull(Exception):
    """The queue holds as many jobs as it may; `str()` says how many."""


class SubmittedBefore(Exception):
    """A request was accepted under this name already; `value` says which."""

    def __init__(self, value: bytes) -> None:
        super().__init__("a request was accepted under this name already")
        self.value = value


_SUBMIT = Script(
    NOW
    + PUSH
    + """
local stream, job, queue, wake, leases, claim, open, audience, once = unpack(KEYS)
local id, entry_id, entry, definition, ttl, deadline, grace = unpack(ARGV, 1, 7)
local max_queued, sequences, name = unpack(ARGV, 8, 10)
if redis.call('EXISTS', stream) == 1 then return 1 end
if once then
  local before = redis.call('GET', once)
  if before then return before end
end
if tonumber(max_queued) > 0 and redis.call('ZCARD', queue) >= tonumber(max_queued) then return 0 end
redis.call('XADD', stream, entry_id, 'e', entry, unpack(ARGV, 11))
redis.call('PEXPIRE', stream, ttl)
if once then redis.call('SET', once, name, 'PX', ttl) end
redis.call('SET', job, definition, 'PX', ttl)
-- To the microsecond: jobs of one millisecond keep their order.
local score = string.format('%d.%03d', now, time[2] % 1000)
redis.call('HSET', claim, 'attempt', 0, 'owner', '', 'score', score,
           'queue', queue, 'leases', leases, 'wake', wake, 'sequences', sequences)
redis.call('PEXPIRE', claim, ttl)
redis.call('ZADD', open, deadline, id)
if tonumber(grace) > 0 then redis.call('ZADD', audience, now + grace, id) end
redis.call('ZADD', queue, score, id)
push(wake)
return 1
"""
)

_FORGET = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end")

_DISCARD = Script("""
local claim, job, retry = unpack(KEYS)
local queue = redis.call('HGET', claim, 'queue')
if not queue or redis.call('ZREM', queue, ARGV[1]) == 0 then return 0 end
redis.call('DEL', claim, job, retry)
return 1
""")

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


class JobQueue(LeasedJobs):
    """The queue of every model, on one Redis server."""

    def __init__(self, redis: ArqRedis, token_streams: TokenStreams) -> None:
        super().__init__(redis)
        self.streams = token_streams
        self._scan_cursor = 0

    # Whoever asks

    async def submit(
        self,
        job: GenerationJob,
        *,
        audience: float = 0,
        max_queued: int = 0,
        form: bytes = b"",
        follow_up: FollowUp = NO_FOLLOW_UP,
        once: Once | None = None,
    ) -> None:
        """Creates the job's stream and enqueues it; does nothing if the stream exists, so it may be called
        again after an unknown outcome.

        `audience`: seconds for which the caller promises to read. `max_queued`: 0 is no limit.
        `form`: kept in the stream's first entry, for whoever writes the answer down.
        `follow_up`: what the seal entails. `once`: a name that must not have been used.

        Raises:
            QueueFull: `max_queued` jobs wait already; nothing was written.
            SubmittedBefore: by `once`; nothing was written.
            RedisError: the outcome is not known.
        """
        definition = serialize(
            {"t": None, "f": FUNCTION, "a": (OpaqueJob(encode(job)),), "k": {}, "et": int(job.created * 1000)}
        )
        if once is not None:
            follow_up = replace(follow_up, expires_with=once.key)
        retention_ms = self.streams.retention_ms
        if follow_up.retention is not None:
            retention_ms = int(follow_up.retention * 1000)
        accepted = await _SUBMIT(
            self.redis,
            [
                keys.stream(job.id),
                keys.arq_job(job.id),
                keys.queue(job.model, job.job_class),
                keys.wake(job.model, job.job_class),
                keys.leases(job.model),
                keys.claim(job.id),
                keys.OPEN,
                keys.AUDIENCE,
                *([once.key] if once else ()),
            ],
            [
                job.id,
                streams.QUEUED_ID,
                entries.encode(entries.Queued(job.model, job.owner, job.created, form)),
                definition,
                # Outlives the deadline by the retention: the reaper seals in between.
                int((job.deadline - job.created) * 1000) + retention_ms,
                int(job.deadline * 1000),
                int(audience * 1000) if job.needs_audience else 0,
                max_queued,
                job.sampling.n,
                once.value if once else b"",
                *follow_up.fields(),
            ],
        )
        if isinstance(accepted, bytes):
            raise SubmittedBefore(accepted)
        if not accepted:
            raise QueueFull(f"{max_queued} requests for {job.model!r} are waiting already")

    async def taken_by(self, once: Once) -> bytes | None:
        """What a name stands for; None if it is free."""
        return cast("bytes | None", await self.redis.get(once.key))

    async def forget(self, once: Once) -> None:
        """Frees a name, if it still stands for that request."""
        await _FORGET(self.redis, [once.key], [once.value])

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
        """Jobs that wait, those on their last try included."""
        queue = keys.queue(model, job_class)
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.zcard(queue)
            pipe.zcard(queue + keys.LAST)
            return sum(await pipe.execute())

    # Reaping: any process may, and several at once do no harm

    async def reap(self, by: str, count: int = 100) -> int:
        """Seals streams whose deadline has passed, and open ones that no queue and no lease holds.

        Returns how many. One call looks at about `count` streams and the next goes on from there.
        """
        late, orphans = await self._stranded(count)
        for job_id in late:
            await self.cancel(job_id, Terminal(by, error=DEADLINE_ERROR))
        for job_id in orphans:
            await self.streams.seal(job_id, Terminal(by, error=REQUEST_LOST))
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
