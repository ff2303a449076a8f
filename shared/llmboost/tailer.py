"""Tails many token streams over one connection, for an API pod or an SDK client.

One XREAD blocks over every followed stream and a wake stream of this process. A reader that joins
appends to the wake stream, so the blocked XREAD returns and the next one includes the newcomer. (CLIENT
UNBLOCK would need no key, but it is lost if it overtakes the XREAD that it means to end, it needs the
connection's id, which changes at every reconnect, and hosted servers often refuse it.)

One connection is enough: while one reply is handed out, every stream that has something waits for the
next XREAD, so the busier the process is, the more tokens each one brings. More connections would split
them. With 300 streams it costs 0.2 to 0.45 of the CPU per token of a connection each, up to 0.7 where the
machine is so busy that those get many tokens per read too (`benchmarks/tailer.py`). Pacing the XREADs
gained nothing measurable.

Each subscription has its own cursor and a bounded `Inbox`. A reader that falls behind leaves the XREAD
with its cursor and joins again when it has caught up: what it has not read waits in Redis, not here.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, cast

from redis.exceptions import RedisError

from llmboost import keys
from llmboost.connection import BLOCK_S, connect
from llmboost.entries import RawEntry, ReadEntry
from llmboost.inbox import Inbox
from llmboost.lua import Script
from llmboost.news import News
from llmboost.streams import StreamGone, TokenStreams, is_passing, is_refusal, persist, position
from llmboost.transcript import StreamGap, Transcript

logger = logging.getLogger(__name__)

READ_COUNT = 64
"""Entries that one XREAD takes from one stream at most, so that no backlog fills the memory."""
WAKE_TTL_MS = 60_000
PAUSE_S = 1.0
"""After a failure that nobody foresaw, so that one that stays does not fill the log."""

_WAKE = Script("""
redis.call('XADD', KEYS[1], 'MAXLEN', 1, ARGV[1] .. '-0', 'w', '')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
""")


class TailerClosed(Exception):
    """The tailer ended, or failed, while the subscription was open; `__cause__` says of what it failed."""


class Subscription:
    """One reader of one stream: an async context manager, and an async iterator over batches of entries.

    Each batch holds the entries that have come since the last one, in order, at least one; the first begins
    with the stream's own first, for what follows can only be checked against what came before. Iteration
    ends after the batch that holds the terminal entry. For one task at a time, and to be entered once.

    Raises (from iteration):
        StreamGone: the stream no longer exists, or never did.
        StreamGap: an entry is missing.
        TailerClosed: the tailer ended first.
    """

    def __init__(self, tailer: "Tailer", job_id: str, news: News | None) -> None:
        self.job_id = job_id
        self.key = keys.stream(job_id).encode()
        self._inbox = Inbox()
        self._tailer = tailer
        self._transcript = Transcript()
        self._error: Exception | None = None
        self._news = news or News()

    async def __aenter__(self) -> "Subscription":
        self._tailer._enter(self)
        self._tailer._refresh(self.key)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tailer._leave(self)
        self._fail(TailerClosed(f"{self.job_id}: the subscription was left"))
        self._inbox.take()

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> list[ReadEntry]:
        if self.ended:
            raise StopAsyncIteration
        while not self.ready:
            await self._news.wait()
        return self.take()

    @property
    def ended(self) -> bool:
        """The terminal entry has been taken."""
        return self._transcript.terminal is not None

    @property
    def ready(self) -> bool:
        """`take` has something to return or to raise. Whether it has may change with every word of `news`."""
        return bool(self._inbox.entries) or self._error is not None

    def take(self) -> list[ReadEntry]:
        """The next batch, of a subscription that is `ready`; raises what iteration does."""
        if not self._inbox.entries and self._error is not None:
            raise self._error
        was_full = not self._inbox.hungry
        entries = self._inbox.take()
        if was_full:
            self._tailer._refresh(self.key)
        try:
            return self._transcript.read(entries)
        except StreamGap as gap:  # Up to there; then the next call raises.
            self._inbox.take()
            self._fail(gap)
            self._tailer._refresh(self.key)
            if not gap.before:
                raise
            return gap.before

    # For the tailer

    def _accept(self, entries: list[RawEntry], read_after: bytes) -> None:
        if self._inbox.accept(entries, read_after):
            self._news.tell()

    def _fail(self, error: Exception) -> None:
        """Ends the iteration with an error once the inbox is empty; the first one counts."""
        if self._error is None:
            self._error = error
        self._inbox.closed = True
        self._news.tell()


class Tailer:
    """One per process; `async with Tailer(...) as tailer:` runs it, whether or not Redis is there yet."""

    def __init__(self, streams: TokenStreams, *, redis_url: str, grace: float) -> None:
        """`grace`: seconds for which a stream has an audience once nobody here reads it any more.

        Raises:
            ValueError: the URL is not a Redis URL.
        """
        self.streams = streams
        self._redis = connect(redis_url, client_name="llmboost-tailer")
        self._renew_every = grace / 5
        # If this process dies, its last promises last for at least the grace. A reader that leaves shortens
        # its own, to lapse within the grace, the way there included.
        self._promise = grace + self._renew_every
        self._farewell = grace * 0.9
        self._subscriptions: dict[bytes, list[Subscription]] = {}
        self._cursors: dict[bytes, bytes] = {}
        """What to read: key of a stream to the least cursor of its hungry subscriptions."""
        self._tasks: list[asyncio.Task[None]] = []
        self._running = False
        self._joined = asyncio.Event()
        """Something is to be read."""
        self._changed = asyncio.Event()
        """A stream has got its first reader, or lost its last."""
        self._unpromised: set[bytes] = set()
        """Streams with a subscription that was entered since the last renewal."""
        self._left: dict[bytes, str] = {}
        """Streams whose last subscription has been left since, with their ids."""
        self._holds = False
        # Wakes are numbered. An XREAD waits for numbers above the last one given before it was sent, so
        # one that arrives late wakes nobody, and no reply needs to be remembered.
        self._wake_key = keys.tailer_wake(secrets.token_hex(8)).encode()
        self._wake_number = 0
        self._wake_awaited: int | None = None
        """What the XREAD in flight waits to be exceeded."""
        self._wake_due = asyncio.Event()
        self._away = False

    async def __aenter__(self) -> "Tailer":
        self._running = True
        loops = (self._follow, self._keep_audience, self._send_wakes)
        self._tasks = [asyncio.create_task(self._repeat(loop)) for loop in loops]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        for task in self._tasks:
            task.cancel()
        self._fail_all("the tailer was closed")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    def tail(self, job_id: str, news: News | None = None) -> Subscription:
        """A reader of the stream. While it is entered, the stream has an audience.

        `news`: is told when it is `ready`, for a task that waits for several.
        """
        return Subscription(self, job_id, news)

    def hold_promises(self) -> None:
        """From now on who leaves is sent away, and has what was promised to come back elsewhere."""
        self._holds = True

    def _fail_all(self, why: str, cause: Exception | None = None) -> None:
        for subscription in [each for group in self._subscriptions.values() for each in group]:
            error = TailerClosed(f"{subscription.job_id}: {why}")
            error.__cause__ = cause
            subscription._fail(error)
            self._refresh(subscription.key)

    async def _repeat(self, loop: Callable[[], Awaitable[None]]) -> None:
        """What nobody foresaw ends the streams that are followed now, so that their readers learn of it, and
        not those to come."""
        while True:
            try:
                await loop()
            except Exception as error:
                logger.exception("following streams failed")
                self._fail_all("following it failed", error)
                await asyncio.sleep(PAUSE_S)

    # For subscriptions

    def _enter(self, subscription: Subscription) -> None:
        if not self._running:
            raise TailerClosed(f"{subscription.job_id}: the tailer does not run")
        self._subscriptions.setdefault(subscription.key, []).append(subscription)
        self._unpromised.add(subscription.key)
        self._changed.set()

    def _leave(self, subscription: Subscription) -> None:
        group = self._subscriptions[subscription.key]
        group.remove(subscription)
        if not group:
            del self._subscriptions[subscription.key]
            if not self._holds:
                self._left[subscription.key] = subscription.job_id
                self._changed.set()
        self._refresh(subscription.key)

    def _refresh(self, key: bytes) -> None:
        """Puts a stream into the XREAD or takes it out; ends the one in flight if it must read more."""
        before = self._cursors.pop(key, None)
        cursors = [each._inbox.cursor for each in self._subscriptions.get(key, ()) if each._inbox.hungry]
        if not cursors:
            return
        cursor = min(cursors, key=position) if len(cursors) > 1 else cursors[0]
        self._cursors[key] = cursor
        self._joined.set()
        if self._wake_awaited != self._wake_number:
            return  # None is in flight, or its end is on the way.
        if before is None or position(cursor) < position(before):
            self._wake_number += 1
            self._wake_due.set()

    # The three loops

    async def _follow(self) -> None:
        """Reads for everyone."""
        while True:
            if not self._cursors:
                self._joined.clear()
                await self._joined.wait()
            asked, reply = await persist(self._read)
            for key, entries in reply:
                self._deliver(key, entries, asked)

    async def _read(self) -> tuple[dict[bytes, bytes], list[tuple[bytes, list[RawEntry]]]]:
        asked = self._cursors.copy()
        self._wake_awaited = self._wake_number
        try:
            reply = await self._redis.xread(
                cast(Any, {self._wake_key: f"{self._wake_number}-0", **asked}),
                count=READ_COUNT,
                block=int(BLOCK_S * 1000),
            )
        except (RedisError, OSError) as error:
            if is_passing(error) and not self._away:
                self._away = True
                logger.warning("lost Redis while following %d streams: %s", len(asked), error)
            raise
        finally:
            self._wake_awaited = None
        if self._away:
            self._away = False
            logger.warning("Redis is back; following %d streams", len(asked))
        return asked, reply

    def _deliver(self, key: bytes, entries: list[RawEntry], asked: dict[bytes, bytes]) -> None:
        if key == self._wake_key:
            return
        for subscription in self._subscriptions.get(key, ()):
            subscription._accept(entries, asked[key])
        self._refresh(key)

    async def _send_wakes(self) -> None:
        """Ends the XREAD in flight when it must read more than it was asked to."""

        async def send() -> None:
            try:
                await _WAKE(self.streams.redis, [self._wake_key.decode()], [self._wake_number, WAKE_TTL_MS])
            except RedisError as error:
                if not is_refusal(error):  # An earlier send has arrived, though its reply was lost.
                    raise

        while True:
            await self._wake_due.wait()
            self._wake_due.clear()
            await persist(send)

    async def _keep_audience(self) -> None:
        """Promises an audience to every stream with a reader: at once when one enters, then periodically; and
        takes a part of it back when the last one leaves."""
        loop = asyncio.get_running_loop()
        due = loop.time() + self._renew_every
        while True:
            try:
                async with asyncio.timeout_at(due):
                    await self._changed.wait()
            except TimeoutError:
                due = loop.time() + self._renew_every
                self._unpromised.update(self._subscriptions)
            self._changed.clear()
            await persist(self._renew)

    async def _renew(self) -> None:
        groups = {key: self._subscriptions.get(key, []) for key in self._unpromised}
        # A stream that was read to its end may expire; and it needs no audience.
        job_ids = {
            group[0].job_id: key
            for key, group in groups.items()
            if not all(each._inbox.closed for each in group)
        }
        missing = await self.streams.renew_audience(list(job_ids), self._promise)
        self._unpromised.difference_update(groups)
        left = self._left.copy()
        alone = [job_id for key, job_id in left.items() if key not in self._subscriptions]
        await self.streams.shorten_audience(alone, self._farewell)
        for key in left:  # and not those who have left meanwhile
            del self._left[key]
        for job_id in missing:
            for subscription in self._subscriptions.get(job_ids[job_id], ()):
                subscription._fail(StreamGone(f"{job_id}: the stream is gone"))
            self._refresh(job_ids[job_id])
