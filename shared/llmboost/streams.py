"""The token stream: a durable log that outlives whoever writes it and whoever reads it.

One request has one Redis stream. This module owns its protocol; nothing else spells an entry id.

- An entry's id is its position and its fence, `<attempt>-<n>`: Redis refuses an id that is not above
  the newest one, so an attempt cannot write once a later one has begun, and sending an entry again
  after a lost reply cannot duplicate it. No lock is involved.
- `0-1` (`Queued`) is written by whoever accepts the request, before the job can be claimed.
- `<attempt>-0` (`Started`) is an attempt's fence: it is written first, and only then is the log read,
  so what was read is all that anyone older will ever have written.
- `<attempt>-<n>` (`Delta`) carries text for the client and token ids for the next attempt.
- `SEAL_ID` (`Terminal`) ends the stream. It is the highest id, so afterwards Redis refuses everything.
  Whatever ends a request (finish, cancel, deadline, lapsed audience, used-up tries) is this one move,
  and the first to make it wins.
- The stream's TTL is set when it is created and outlasts the request's deadline, at which it is sealed
  whatever its state; so a running stream can't expire, and none is left behind.
- The first entry also says what follows from the seal (`FollowUp`), and the seal's script does it: whoever
  seals, and whatever dies then, it happens, once.
- A server that was killed may come back without the end of its log. Positions show what is missing between
  two deltas, and an attempt's seal says which entry it follows: if that is not the last, it is an error.
  Whoever reads a log does so by `llmboost.transcript`, which lets nothing pass that follows a gap.
"""

import asyncio
import enum
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llmboost import keys
from llmboost.audience import Audience
from llmboost.entries import (
    REQUEST_LOST,
    Entry,
    Queued,
    RawEntry,
    ReadEntry,
    Started,
    Terminal,
    decode,
    encode,
)
from llmboost.lua import ENQUEUE_ARQ, NOW, Script
from llmboost.transcript import Transcript, read_log

QUEUED_ID = "0-1"
SEAL_ATTEMPT = 2**53 - 1
SEAL_ID = f"{SEAL_ATTEMPT}-0"
"""2^53-1 is the largest integer that Lua and JavaScript hold exactly."""
BEGINNING = "0-0"
"""Below the id of every entry."""


def position(entry_id: str | bytes) -> tuple[int, int]:
    """An entry id as what Redis sorts it by."""
    attempt, n = entry_id.split(b"-") if isinstance(entry_id, bytes) else entry_id.split("-")
    return int(attempt), int(n)


# --- Endings of a write or a read ---------------------------------------------------------------------


class StreamEnded(Exception):
    """This attempt may write nothing more; `str()` says why."""


class StreamFenced(StreamEnded):
    """A later attempt has begun."""


class StreamSealed(StreamEnded):
    """The request has ended; somebody wrote the terminal entry."""


class StreamGone(StreamEnded):
    """The stream does not exist: expired, or lost with its server."""


# --- Writing ----------------------------------------------------------------------------------------


class SealOutcome(enum.Enum):
    """What came of an attempt to seal."""

    WRITTEN = b"written"
    """The terminal entry is mine."""
    SEALED = b"sealed"
    """Somebody else's is there."""
    FENCED = b"fenced"
    """A later attempt runs: not mine to seal."""
    LOST = b"lost"
    """An error was written in its place: what I had appended last is not there any more."""
    GONE = b"gone"


_SEAL = Script(
    NOW
    + ENQUEUE_ARQ
    + """
local seal_id, payload, retention, id, attempt, last, lost = unpack(ARGV)
local function follow_up()
  local first = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][2]
  local follow = {}
  for i = 1, #first, 2 do follow[first[i]] = first[i + 1] end
  retention = follow.retention or retention
  redis.call('PEXPIRE', KEYS[1], retention)
  if follow.expires_with then redis.call('PEXPIRE', follow.expires_with, retention) end
  if follow.push_to then
    redis.call('RPUSH', follow.push_to, id)
    redis.call('PEXPIRE', follow.push_to, 86400000)
  end
  if follow.job then enqueue_arq(KEYS[4] .. follow.job_id, follow.job_queue, follow.job_id, follow.job) end
end
local top = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local outcome
if not top then
  outcome = 'gone'
elseif top[1] == seal_id then
  outcome = top[2][2] == payload and 'written' or 'sealed'
elseif attempt ~= '' and tonumber(string.match(top[1], '^%d+')) > tonumber(attempt) then
  return 'fenced'
else
  outcome = 'written'
  if last ~= '' and top[1] ~= last then outcome, payload = 'lost', lost end
  redis.call('XADD', KEYS[1], seal_id, 'e', payload, 'at', now)
  follow_up()
end
redis.call('ZREM', KEYS[2], id)
redis.call('ZREM', KEYS[3], id)
return outcome
"""
)

_APPEND = Script("""
local replies = {}
for i, key in ipairs(KEYS) do
  replies[i] = redis.pcall('XADD', key, 'NOMKSTREAM', ARGV[2 * i - 1], 'e', ARGV[2 * i])
end
return replies
""")

_BEGIN = Script("""
local reply = redis.pcall('XADD', KEYS[1], 'NOMKSTREAM', ARGV[1], 'e', ARGV[2])
return {reply, redis.call('XRANGE', KEYS[1], '-', '+')}
""")

_PASSING = (
    "LOADING",
    "READONLY",
    "You can't write against",  # redis-py's READONLY
    "MASTERDOWN",
    "MISCONF",
    "OOM",
    "BUSY ",  # with another script
    "UNBLOCKED",  # by a failover
)
_REFUSED = "equal or smaller than the target stream top item"


def is_refusal(error: Exception) -> bool:
    """Whether Redis refused an entry because its id is not above the newest one."""
    return isinstance(error, ResponseError) and _REFUSED in str(error)


def is_passing(error: BaseException) -> bool:
    """Whether a command's outcome is unknown, or the server can't serve it now (gone, loading, read-only,
    out of memory): the same command should be sent again, later."""
    if isinstance(error, ResponseError):
        return str(error).startswith(_PASSING)
    return isinstance(error, RedisConnectionError | RedisTimeoutError | OSError)


T = TypeVar("T")


async def persist(call: Callable[[], Awaitable[T]], *, first: float = 0.05, most: float = 1.0) -> T:
    """Awaits `call()` until it does not fail in passing; waits between with jitter, doubling up to `most` s.

    Only for calls that may be sent twice. Cancel it, or wrap it in a timeout, to give up.
    """
    delay = first
    while True:
        try:
            return await call()
        except (RedisError, OSError) as error:
            if not is_passing(error):
                raise
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))
        delay = min(delay * 2, most)


@dataclass(slots=True)
class Writer:
    """One attempt's right to append to one stream: hands out its entry ids."""

    job_id: str
    attempt: int
    n: int = 0

    @property
    def fence_id(self) -> str:
        """Id of the attempt's first entry."""
        return f"{self.attempt}-0"

    @property
    def last_id(self) -> str:
        """Id of the attempt's latest entry."""
        return f"{self.attempt}-{self.n}"

    def next_id(self) -> str:
        """Id of the attempt's next entry: taken once, and kept when the entry must be sent again."""
        self.n += 1
        return self.last_id


class TokenStreams(Audience):
    """Streams on one Redis server; every method is safe to call again after an unknown outcome."""

    def __init__(self, redis: Redis, retention: float) -> None:
        """`retention`: seconds that a sealed stream stays readable."""
        self.redis = redis
        self.retention_ms = int(retention * 1000)

    # Writers

    async def begin(self, writer: Writer, worker: str) -> Transcript:
        """Fences off older attempts, then reads all that they emitted.

        Raises:
            StreamEnded: sealed, gone, or fenced by a later attempt.
            StreamGap: a part of it was lost, so it can't be continued.
        """
        transcript = Transcript()
        transcript.read(await persist(lambda: self._begin(writer, Started(worker))))
        if transcript.terminal is not None:
            raise StreamSealed(f"{writer.job_id}: sealed by {transcript.terminal.by}")
        return transcript

    async def _begin(self, writer: Writer, fence: Started) -> list[RawEntry]:
        reply, raw = await _BEGIN(self.redis, [keys.stream(writer.job_id)], [writer.fence_id, encode(fence)])
        await self.check_reply(writer, writer.fence_id, reply)
        return [(entry_id, dict(zip(fields[::2], fields[1::2], strict=True))) for entry_id, fields in raw]

    async def append(self, entries: Sequence[tuple[str, str, Entry]]) -> list[bytes | Exception | None]:
        """Appends to many streams at once, (id of the job, of the entry, entry) each; the replies go to
        `check_reply`. In one script, so that whoever reads them is woken once and finds them all.

        NOMKSTREAM: a stream that is gone must not come back as one without a beginning.
        """
        contents = [part for _, entry_id, entry in entries for part in (entry_id, encode(entry))]
        replies = await _APPEND(self.redis, [keys.stream(job_id) for job_id, _, _ in entries], contents)
        return cast("list[bytes | Exception | None]", replies)

    async def check_reply(self, writer: Writer, entry_id: str, reply: bytes | Exception | None) -> None:
        """Returns if the entry is in the stream; a refused one may be there from an earlier send.

        Raises:
            StreamEnded: it is not, and never will be.
            RedisError: the outcome is not known.
        """
        if reply is None:
            raise StreamGone(f"{writer.job_id}: the stream is gone")
        if not isinstance(reply, Exception):
            return
        if not is_refusal(reply):
            raise reply
        newest = await self.newest_id(writer.job_id)
        if newest == entry_id:
            return
        if newest is None:
            raise StreamGone(f"{writer.job_id}: the stream is gone")
        if newest == SEAL_ID:
            raise StreamSealed(f"{writer.job_id}: sealed while attempt {writer.attempt} was writing")
        attempt = newest.partition("-")[0]
        raise StreamFenced(f"{writer.job_id}: attempt {attempt} has taken over from {writer.attempt}")

    async def seal(self, job_id: str, terminal: Terminal, writer: Writer | None = None) -> SealOutcome:
        """Ends the stream; with a `writer`, only if no later attempt has begun, and as answered only if all
        that it appended is still there: a server may have lost the end of its log."""
        attempt = "" if writer is None else str(writer.attempt)
        last = "" if writer is None or terminal.error is not None else writer.last_id
        lost = encode(Terminal(terminal.by, error=REQUEST_LOST))
        reply = await persist(
            lambda: _SEAL(
                self.redis,
                [keys.stream(job_id), keys.OPEN, keys.AUDIENCE, keys.arq_job("")],
                [SEAL_ID, encode(terminal), self.retention_ms, job_id, attempt, last, lost],
            )
        )
        return SealOutcome(reply)

    # Readers

    async def newest_id(self, job_id: str) -> str | None:
        """Id of the last entry; None if there is no stream."""
        entries = await self.redis.xrevrange(keys.stream(job_id), count=1)
        return cast(bytes, entries[0][0]).decode() if entries else None

    async def sealed(self, job_ids: Sequence[str]) -> list[bool | None]:
        """Whether each stream has been sealed; None: there is no such stream."""
        pipe = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.xrevrange(keys.stream(job_id), count=1)
        return [top[0][0] == SEAL_ID.encode() if top else None for top in await pipe.execute()]

    async def read(self, job_id: str) -> list[ReadEntry]:
        """All entries so far, without waiting; none too if there is no stream.

        A log with a gap is read up to there, and once it is sealed, its end is an error: `GAP`, if no other.
        """
        return read_log(await self.redis.xrange(keys.stream(job_id)))

    async def read_each(self, job_ids: Sequence[str]) -> list[list[ReadEntry]]:
        """The same of several streams, in one round trip."""
        pipe = self.redis.pipeline(transaction=False)
        for job_id in job_ids:
            pipe.xrange(keys.stream(job_id))
        return [read_log(entries) for entries in await pipe.execute()]

    async def find(self, job_id: str, entry_id: str) -> tuple[Queued | None, bool]:
        """What the stream begins with, None if it does not exist; and whether it holds an entry."""
        key = keys.stream(job_id)
        pipe = self.redis.pipeline(transaction=False)
        pipe.xrange(key, count=1)
        pipe.xrange(key, min=entry_id, max=entry_id)
        first, found = await pipe.execute()
        queued = decode(first)[0][1] if first else None
        return (queued if isinstance(queued, Queued) else None), bool(found)

    # Whoever no longer wants it

    async def delete(self, job_ids: Sequence[str]) -> None:
        """Forgets streams, which should have been sealed. Whoever still writes one learns that it is gone."""
        if job_ids:
            await self.redis.unlink(*map(keys.stream, job_ids))
