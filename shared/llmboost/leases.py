"""Claims and leases: which worker runs a job, for how long, and who is to blame when a worker dies.

A claim takes a job out of its queue and puts it under a lease, which its worker renews. When the lease
lapses, any worker that has itself been in contact puts the job back; `renew`, `release` and `finish` compare
owner and attempt first, so a worker that lost its lease changes nothing.

**Blame.** A request may be what kills its worker, so deaths in a row without progress are counted, and at
`max_tries` of them the request is given up. But a worker dies with all its jobs, of which at most one is to
blame:

- Only an attempt that has begun is a suspect (arq's `arq:retry:<id>` is there from its beginning), and only
  until its worker *acquits* it, because it has gone on producing for a while. That sets its deaths to 0.
- A job with one try left is claimed from a queue of its own (`<queue>:last`), at most one at a time per
  worker, which is then *on probation* for it until the job is acquitted or has ended. If a worker dies on
  probation, that job alone is counted, and so is given up.

**An outage is not a death.** While Redis is away nobody can renew, and afterwards every lease has lapsed. So
`reclaim` does nothing for a worker whose own renewals have been interrupted within the last lease, by
whatever: Redis, the network, its own event loop. Meanwhile the others renew.
"""

from collections.abc import Awaitable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from arq.connections import ArqRedis

from llmboost import keys
from llmboost.connection import BLOCK_S
from llmboost.jobs import JOB_CLASSES, JobClass
from llmboost.lua import NOW, Script

UNBROKEN = 2 / 3
"""Part of a lease: renewals further apart than this are an interruption. A worker that tries to renew five
times per lease, and waits for no answer longer than a quarter of it, may miss one."""
WAKE_TOKENS = 1024
"""Of one list, kept at most; more than that many workers don't wait at once."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in this worker's hands, for as long as it renews the lease."""

    job_id: str
    attempt: int
    score: int
    """arq's score: enqueue time in ms."""
    job_class: JobClass = "interactive"
    sequences: int = 1
    """That it keeps an engine busy with: its choices."""
    on_probation: bool = False
    """The worker has it on probation until it says otherwise."""
    used_up: bool = False
    """Its tries are used up: not to be run."""


PUSH = f"""
local function push(wake)
  if redis.call('LLEN', wake) < {WAKE_TOKENS} then redis.call('LPUSH', wake, 1) end
  redis.call('PEXPIRE', wake, 3600000)
end
"""
"""Lua prelude: pushes a wake token."""

# A claim's hash says where the job waits or goes back to (`queue`, `score`), the model's `leases` and `wake`
# (names of keys), its number of `sequences`, and its `deaths`, if any.
_PUT_BACK = (
    PUSH
    + """
local function put_back(id)
  local claim = KEYS[1] .. id
  local queue, leases, wake, score = unpack(redis.call('HMGET', claim, 'queue', 'leases', 'wake', 'score'))
  if not queue then return end
  redis.call('ZREM', leases, id)
  redis.call('DEL', KEYS[2] .. id)
  redis.call('HSET', claim, 'owner', '')
  -- By its time of enqueueing it is near the head.
  redis.call('ZADD', queue, score, id)
  push(wake)
end
"""
)

_MINE = """
local function mine(id, owner, attempt)
  local held_by, held_attempt = unpack(redis.call('HMGET', KEYS[1] .. id, 'owner', 'attempt'))
  return held_by == owner and held_attempt == attempt
end
"""

_WAKE = Script(PUSH + "for _, wake in ipairs(KEYS) do push(wake) end")

_CLAIM = Script(
    NOW
    + """
local claims, leases, probation = unpack(KEYS, 1, 3)
local owner, lease, last = unpack(ARGV, 1, 3)
local taken, sequences = {}, 0
local function take(class, queue, room, most)
  local jobs = redis.call('ZRANGE', queue, '-inf', now + 1, 'BYSCORE', 'LIMIT', 0, most, 'WITHSCORES')
  for i = 1, #jobs, 2 do
    if sequences >= room then return end
    local id = jobs[i]
    redis.call('ZREM', queue, id)
    local attempt = redis.call('HINCRBY', claims .. id, 'attempt', 1)
    redis.call('HSET', claims .. id, 'owner', owner)
    -- The hash of a job that expired while it waited has just come back without its TTL.
    if redis.call('PTTL', claims .. id) < 0 then redis.call('PEXPIRE', claims .. id, 3600000) end
    redis.call('ZADD', leases, now + lease, id)
    local its = tonumber(redis.call('HGET', claims .. id, 'sequences') or 1)
    sequences = sequences + its
    taken[#taken + 1] = {id, attempt, jobs[i + 1], class, its}
  end
end
local function take_last_try(class, queue, room)
  if redis.call('EXISTS', queue) == 0 or redis.call('EXISTS', probation) == 1 then return end
  local before = #taken
  take(class, queue, room, 1)
  local claim = taken[before + 1]
  if not claim then return end
  local used_up = redis.call('HEXISTS', claims .. claim[1], 'used_up')
  claim[6] = used_up
  if used_up == 0 then redis.call('SET', probation, claim[1], 'PX', 3600000) end
end
for i = 4, #KEYS, 2 do
  local class, queue, wake = i / 2 - 2, KEYS[i], KEYS[i + 1]
  local room = tonumber(ARGV[4 + class])
  if sequences < room then take_last_try(class, queue .. last, room) end
  if sequences < room then take(class, queue, room, room - sequences) end
  -- What is there for jobs that are there no more would wake somebody for nothing.
  if sequences < room and redis.call('EXISTS', queue .. last) == 0 then redis.call('DEL', wake) end
end
return taken
"""
)

_RENEW = Script(
    NOW
    + _MINE
    + """
local claims, retries, leases, contact = unpack(KEYS)
local owner, lease, unbroken, last = unpack(ARGV, 1, 4)
redis.call('SET', contact, now, 'NX', 'PX', unbroken)
redis.call('PEXPIRE', contact, unbroken)
local lost = {}
for i = 5, #ARGV, 3 do
  local id, attempt, acquitted = unpack(ARGV, i, i + 2)
  if mine(id, owner, attempt) then
    redis.call('ZADD', leases, now + lease, id)
    if acquitted == '1' then
      redis.call('DEL', retries .. id)
      local queue, deaths = unpack(redis.call('HMGET', claims .. id, 'queue', 'deaths'))
      if deaths then
        redis.call('HDEL', claims .. id, 'deaths')
        if string.sub(queue, -#last) == last then queue = string.sub(queue, 1, -#last - 1) end
        redis.call('HSET', claims .. id, 'queue', queue)
      end
    end
  else
    lost[#lost + 1] = id
  end
end
return lost
"""
)

_END_PROBATION = Script(
    PUSH
    + """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return end
redis.call('DEL', KEYS[1])
for i = 2, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 1 then push(KEYS[i + 1]) end
end
"""
)

_RELEASE = Script(
    _MINE
    + _PUT_BACK
    + """
local lost = {}
for i = 2, #ARGV, 2 do
  if mine(ARGV[i], ARGV[1], ARGV[i + 1]) then put_back(ARGV[i]) else lost[#lost + 1] = ARGV[i] end
end
return lost
"""
)

_FINISH = Script(
    _MINE
    + """
local id, owner, attempt = unpack(ARGV)
if not mine(id, owner, attempt) then
  -- Of a job that is over already nothing is to stay, whatever a later claim of it has left.
  if redis.call('EXISTS', KEYS[1] .. id) == 0 then redis.call('DEL', KEYS[3], KEYS[4]) end
  return 0
end
redis.call('ZREM', KEYS[2], id)
redis.call('DEL', KEYS[1] .. id, KEYS[3], KEYS[4])
return 1
"""
)

_RECLAIM = Script(
    NOW
    + _PUT_BACK
    + """
local claims, retries, leases, contact, probations = unpack(KEYS)
local lease, max_tries, last, most = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local since = redis.call('GET', contact)
if not since or now - since < lease then return {} end
local function count_death(id)
  local claim = claims .. id
  local deaths = redis.call('HINCRBY', claim, 'deaths', 1)
  if deaths >= max_tries - 1 then
    local queue = redis.call('HGET', claim, 'queue')
    if string.sub(queue, -#last) ~= last then redis.call('HSET', claim, 'queue', queue .. last) end
  end
  if deaths >= max_tries then redis.call('HSET', claim, 'used_up', 1) end
end
local lapsed = redis.call('ZRANGE', leases, '-inf', now, 'BYSCORE', 'LIMIT', 0, most)
for _, id in ipairs(lapsed) do
  redis.call('ZREM', leases, id)
  local owner = redis.call('HGET', claims .. id, 'owner')
  if owner then
    local suspect = redis.call('GET', probations .. owner)
    local begun = redis.call('EXISTS', retries .. id) == 1
    if begun and (not suspect or suspect == id) then count_death(id) end
    -- Its other jobs lapse within a lease of this one, and must find it too.
    if suspect == id then redis.call('PEXPIRE', probations .. owner, 2 * lease) end
    put_back(id)
  end
end
return lapsed
"""
)


class LeasedJobs:
    """What workers do with the queue of their model."""

    def __init__(self, redis: ArqRedis) -> None:
        self.redis = redis

    async def wait(
        self, model: str, seconds: float = BLOCK_S, classes: Sequence[JobClass] = JOB_CLASSES
    ) -> bool:
        """Waits for a wake token of one of the classes; false if none came. Blocks a connection for up to
        `BLOCK_S`."""
        wakes = [keys.wake(model, each) for each in classes]
        token = self.redis.blpop(wakes, timeout=cast(int, min(seconds, BLOCK_S)))
        return await cast("Awaitable[Any]", token) is not None

    async def wake(self, model: str, classes: Sequence[JobClass] = JOB_CLASSES) -> None:
        """Pushes a wake token for each of the classes, as an enqueue does."""
        await _WAKE(self.redis, [keys.wake(model, each) for each in classes], [])

    async def claim(
        self, model: str, room: int | Mapping[JobClass, int], owner: str, lease: float
    ) -> list[Claim]:
        """Takes jobs under a lease (s), oldest first, interactive before batch; and of those on their last
        try one, unless the owner has one on probation.

        `room`: for how many sequences there is room. Of batch jobs there may be room for fewer, since they
        give way to others: those of both classes count against it. The last one taken may need more.
        """
        rooms = [room if isinstance(room, int) else room[each] for each in JOB_CLASSES]
        taken = await _CLAIM(
            self.redis,
            [
                keys.claim(""),
                keys.leases(model),
                keys.probation(owner),
                *(key(model, each) for each in JOB_CLASSES for key in (keys.queue, keys.wake)),
            ],
            [owner, _ms(lease), keys.LAST, *rooms],
        )
        claims = []
        for job_id, attempt, score, job_class, sequences, *last_try in taken:
            used_up = bool(last_try and last_try[0])
            claims.append(
                Claim(
                    job_id.decode(),
                    attempt,
                    int(float(score)),
                    JOB_CLASSES[job_class],
                    sequences,
                    on_probation=bool(last_try) and not used_up,
                    used_up=used_up,
                )
            )
        return claims

    async def renew(
        self,
        model: str,
        owner: str,
        lease: float,
        claims: Sequence[Claim],
        acquitted: Collection[Claim] = (),
    ) -> list[str]:
        """Extends the leases and keeps the owner in contact; returns the ids of jobs that are not its own any
        more. Those of `claims` that are `acquitted` are no suspects if the owner dies."""
        parts: list[str | int] = []
        for claim in claims:
            parts += [claim.job_id, claim.attempt, int(claim in acquitted)]
        lost = await _RENEW(
            self.redis,
            [keys.claim(""), keys.arq_retry(""), keys.leases(model), keys.contact(owner)],
            [owner, _ms(lease), _ms(lease * UNBROKEN), keys.LAST, *parts],
        )
        return [cast(bytes, job_id).decode() for job_id in lost]

    async def end_probation(self, model: str, owner: str, job_id: str) -> None:
        """The job is acquitted, or has ended: the next one on its last try may come."""
        places = [
            key
            for each in JOB_CLASSES
            for key in (keys.queue(model, each) + keys.LAST, keys.wake(model, each))
        ]
        await _END_PROBATION(self.redis, [keys.probation(owner), *places], [job_id])

    async def release(self, owner: str, claims: Sequence[Claim]) -> list[str]:
        """Hands jobs back to their queue, which costs them no try; returns the ids of those that were no
        longer this owner's."""
        pairs: list[str | int] = [part for claim in claims for part in (claim.job_id, claim.attempt)]
        lost = await _RELEASE(self.redis, [keys.claim(""), keys.arq_retry("")], [owner, *pairs])
        return [cast(bytes, job_id).decode() for job_id in lost]

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

    async def reclaim(
        self, model: str, owner: str, lease: float, max_tries: int, count: int = 1000
    ) -> list[str]:
        """Puts jobs whose lease has lapsed back into their queue, and counts a death against suspects;
        returns their ids. None if the owner has not been in contact for a whole lease."""
        lapsed = await _RECLAIM(
            self.redis,
            [
                keys.claim(""),
                keys.arq_retry(""),
                keys.leases(model),
                keys.contact(owner),
                keys.probation(""),
            ],
            [_ms(lease), max_tries, keys.LAST, count],
        )
        return [cast(bytes, job_id).decode() for job_id in lapsed]


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
