"""Batches in Redis, as runners deal with them: one runner at a time holds a batch, and only it changes it.

A runner claims a batch under a lease, which it renews. When the lease has lapsed any runner may claim it,
under the next attempt number; from then on every script refuses the one before, whatever it has still under
way. So what a script does, it does for the one holder, and it may be sent again if its outcome is unknown.

Results are written into objects first, and then committed by one script: it lists the objects, and marks
their lines as done. An object that is not listed does not exist for anyone, and a line that is marked is
never run again. So each line is in one listed object, whoever is killed in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.asyncio import Redis

from llmboost import keys
from llmboost.entries import ArqJob, Usage
from llmboost.lua import ENQUEUE_ARQ, NOW, Script, Value
from llmboost_api.batches.record import ENDED, Batch, Problem, Status, hash_of
from llmboost_api.files.catalogue import PUBLISH_FILE, publication
from llmboost_api.files.record import FileRecord

LEASE_S = 5.0
RENEW_EVERY_S = 1.0
"""Also how long it takes a runner to learn that its batch is cancelled."""


class BatchLost(Exception):
    """Another runner holds the batch, or it is gone: this one may change nothing more."""


@dataclass(frozen=True, slots=True)
class Part:
    """An object with results."""

    name: str
    failed: bool
    """Whether they go into the error file."""


@dataclass(frozen=True, slots=True)
class Results:
    """What one commit adds to a batch."""

    parts: Sequence[Part]
    lines: Sequence[int]
    """Their numbers, from 1."""
    completed: int
    failed: int
    expired: int
    """Of the failed ones."""
    usage: Usage


_CLAIM = Script(
    NOW
    + """
local holder, lease, count, batches = unpack(ARGV)
local taken = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], '-inf', now, 'BYSCORE', 'LIMIT', 0, count)) do
  local batch = batches .. id
  redis.call('ZADD', KEYS[1], now + lease, id)
  redis.call('HSET', batch, 'holder', holder)
  taken[#taken + 1] = {id, redis.call('HINCRBY', batch, 'attempt', 1)}
  -- The hash of a batch that has expired has just come back.
  if redis.call('PTTL', batch) < 0 then redis.call('PEXPIRE', batch, 3600000) end
end
return taken
"""
)

_MINE = (
    NOW
    + """
local batch = KEYS[1]
local held_by, held_attempt = unpack(redis.call('HMGET', batch, 'holder', 'attempt'))
if held_by ~= ARGV[1] or held_attempt ~= ARGV[2] then return false end
local seconds = math.floor(now / 1000)
"""
)
"""Lua prelude: ends here, with nil, unless the holder holds the batch."""

_RENEW = Script(
    _MINE
    + """
redis.call('ZADD', KEYS[2], 'XX', now + ARGV[4], ARGV[3])
return redis.call('HGET', batch, 'status') or ''
"""
)

_RELEASE = Script(
    _MINE
    + """
redis.call('HSET', batch, 'holder', '')
redis.call('ZADD', KEYS[2], 'XX', now + ARGV[4], ARGV[3])
return 1
"""
)

_BEGIN = Script(
    _MINE
    + """
redis.call('HSET', batch, 'total', ARGV[3], 'in_progress_at', seconds)
if ARGV[4] ~= '' then redis.call('HSET', batch, 'model', ARGV[4]) end
if redis.call('HGET', batch, 'status') == 'validating' then
  redis.call('HSET', batch, 'status', 'in_progress')
end
return 1
"""
)

_LINES_DONE = Script(_MINE + "return redis.call('GET', KEYS[2]) or ''")

_COMMIT = Script(
    _MINE
    + """
local lines, parts = KEYS[2], KEYS[3]
local each = {'completed', 'failed', 'expired', 'prompt_tokens', 'completion_tokens', 'cached_tokens'}
local first_part, first_line = 4 + #each, 4 + #each + ARGV[3]
if redis.call('ZSCORE', parts, ARGV[first_part]) then return 1 end
for i = first_part, first_line - 1 do redis.call('ZADD', parts, redis.call('ZCARD', parts), ARGV[i]) end
for i = first_line, #ARGV do redis.call('SETBIT', lines, ARGV[i] - 1, 1) end
for i, field in ipairs(each) do redis.call('HINCRBY', batch, field, ARGV[3 + i]) end
local ttl = redis.call('PTTL', batch)
redis.call('PEXPIRE', lines, ttl)
redis.call('PEXPIRE', parts, ttl)
return 1
"""
)

_FINALIZE = Script(
    _MINE
    + """
local get = function(field) return tonumber(redis.call('HGET', batch, field) or 0) end
local status = redis.call('HGET', batch, 'status')
if get('completed') + get('failed') < get('total') then return 'incomplete' end
if status == 'cancelling' then return 'cancelled' end
redis.call('HSET', batch, 'status', 'finalizing', 'finalizing_at', seconds)
return get('expired') > 0 and 'expired' or 'completed'
"""
)

_FINISH = Script(
    PUBLISH_FILE
    + _MINE
    + ENQUEUE_ARQ
    + """
local status, ttl, errors, files = unpack(ARGV, 3, 6)
if redis.call('HGET', batch, 'status') == status then return 1 end
redis.call('HSET', batch, 'status', status, status .. '_at', seconds)
if errors ~= '' then redis.call('HSET', batch, 'errors', errors) end
for i = 0, files - 1 do
  local k, a = 2 + 3 * i, 7 + 5 * i
  redis.call('HSET', batch, ARGV[a], ARGV[a + 1])
  publish_file(KEYS[k], KEYS[k + 1], KEYS[k + 2], unpack(ARGV, a + 1, a + 4))
end
redis.call('PEXPIRE', batch, ttl)
local once = redis.call('HGET', batch, 'once')
if once then redis.call('PEXPIRE', once, ttl) end
local k, a = 2 + 3 * files, 7 + 5 * files
if KEYS[k] then enqueue_arq(KEYS[k], KEYS[k + 1], ARGV[a], ARGV[a + 1]) end
return 1
"""
)

_FORGET = Script(
    _MINE
    + """
redis.call('ZREM', KEYS[2], ARGV[3])
redis.call('DEL', unpack(KEYS, 3))
if redis.call('HEXISTS', batch, 'record') == 0 then redis.call('DEL', batch) end
return 1
"""
)


async def claim(redis: Redis, holder: str, count: int) -> "list[Holding]":
    """Takes up to so many batches that nobody holds, those that have waited longest first."""
    taken = await _CLAIM(redis, [keys.BATCHES], [holder, _ms(LEASE_S), count, keys.batch("")])
    return [Holding(redis, batch_id.decode(), holder, attempt) for batch_id, attempt in taken]


class Holding:
    """One runner's hold on one batch.

    Every method raises `BatchLost` if it is over, and may be called again after an unknown outcome.
    """

    def __init__(self, redis: Redis, batch_id: str, holder: str, attempt: int) -> None:
        self.redis = redis
        self.id = batch_id
        self.holder = holder
        self.attempt = attempt

    # The lease

    async def renew(self) -> str:
        """Extends the lease; returns the batch's status."""
        status: bytes = await self._do(_RENEW, [keys.BATCHES], [self.id, _ms(LEASE_S)])
        return status.decode()

    async def release(self, pause: float = 0) -> None:
        """Lets any runner take it at once, or after so many seconds."""
        await self._do(_RELEASE, [keys.BATCHES], [self.id, _ms(pause)])

    # What is there

    async def get(self) -> Batch | None:
        """The batch; None if it is not kept any more."""
        return Batch.of(await hash_of(self.redis, self.id))

    async def lines_done(self) -> bytes:
        """The bitmap of lines that are in a part. Nobody but the holder can add to it."""
        bitmap: bytes = await self._do(_LINES_DONE, [keys.batch_lines(self.id)], [])
        return bitmap

    async def done_elsewhere(self) -> bytes | None:
        """The same, if another runner holds the batch; None if it has ended."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(keys.batch(self.id))
            pipe.get(keys.batch_lines(self.id))
            fields, bitmap = await pipe.execute()
        batch = Batch.of(fields)
        return None if batch is None or batch.progress.status in ENDED else bitmap or b""

    async def parts(self) -> list[Part]:
        """All that are committed, in order."""
        return [_part(name) for name in await self.redis.zrange(keys.batch_parts(self.id), 0, -1)]

    # What is done

    async def begin(self, total: int, model: str | None) -> None:
        """Its lines have been validated, and are so many."""
        await self._do(_BEGIN, [], [total, model or ""])

    async def commit(self, results: Results) -> None:
        """Adds results, whose parts have been written."""
        usage = results.usage
        await self._do(
            _COMMIT,
            [keys.batch_lines(self.id), keys.batch_parts(self.id)],
            [
                len(results.parts),
                results.completed,
                results.failed,
                results.expired,
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                *(_member(part) for part in results.parts),
                *results.lines,
            ],
        )

    async def finalize(self) -> Status | None:
        """Its lines are done, so that it can only end, and in which status; None: some are not."""
        outcome: bytes = await self._do(_FINALIZE, [], [])
        return None if outcome == b"incomplete" else msgspec.convert(outcome.decode(), Status)

    async def finish(
        self,
        status: Status,
        ttl: float,
        *,
        output: FileRecord | None = None,
        error: FileRecord | None = None,
        problems: Sequence[Problem] = (),
        job: ArqJob | None = None,
    ) -> None:
        """Ends it: makes its files known, whose bytes have been written, and enqueues what follows."""
        names: list[str] = []
        values: list[Value] = []
        for field, record in (("output_file_id", output), ("error_file_id", error)):
            if record is not None:
                file_keys, file_values = publication(record)
                names += file_keys
                values += [field, *file_values]
        if job is not None:
            names += [keys.arq_job(job.id), job.queue]
            values += [job.id, job.definition]
        errors = msgspec.json.encode(list(problems)) if problems else b""
        files = (output is not None) + (error is not None)
        await self._do(_FINISH, names, [status, _ms(ttl), errors, files, *values])

    async def forget(self) -> None:
        """Nothing is left to do: removes what only runners need."""
        await self._do(
            _FORGET,
            [
                keys.BATCHES,
                keys.batch_lines(self.id),
                keys.batch_parts(self.id),
                keys.batch_sealed(self.id),
            ],
            [self.id],
        )

    async def _do(self, script: Script, names: Sequence[str], values: Sequence[Value]) -> Any:
        reply = await script(self.redis, [keys.batch(self.id), *names], [self.holder, self.attempt, *values])
        if reply is None:
            raise BatchLost(f"{self.id}: attempt {self.attempt} of {self.holder} is over")
        return reply


def _member(part: Part) -> str:
    return f"{'error' if part.failed else 'output'}:{part.name}"


def _part(member: bytes) -> Part:
    kind, _, name = member.decode().partition(":")
    return Part(name, failed=kind == "error")


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
