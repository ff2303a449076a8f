"""Appends what the engine produces to the token streams: one command per step, whatever the number of jobs.

`publish` only queues and returns, so the event loop never waits for Redis while the engine steps on. What
comes while a command is under way goes into the next one. While Redis is away everything is kept, bounded by
the tokens that the running requests may still produce, and sent when it is back.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost.entries import ChoiceDelta, Delta
from llmboost.streams import StreamEnded, TokenStreams, Writer, is_passing, persist

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Outbox:
    """What one attempt has still to append to its stream, in order."""

    writer: Writer
    on_end: Callable[[StreamEnded], None]
    """Called once if the stream turns out to have ended; nothing is sent after that."""
    pending: deque[Delta] = field(default_factory=deque)
    in_flight: tuple[str, Delta] | None = None
    """Entry id and content; kept unchanged until its outcome is known."""
    empty: asyncio.Event = field(default_factory=asyncio.Event)
    hurries: bool = False
    """Nothing of it is kept to make larger entries."""
    first_token_at: float | None = None
    """Monotonic time at which the attempt's first new token was known to be in the stream."""
    latest_token_at: float = 0.0

    def __post_init__(self) -> None:
        self.empty.set()

    def take(self) -> tuple[str, Delta]:
        """The entry to send: the one in flight, else all that is pending as one entry."""
        if self.in_flight is None:
            choices = [choice for delta in self.pending for choice in delta.choices]
            prompt_tokens = next((d.prompt_tokens for d in self.pending if d.prompt_tokens is not None), None)
            self.pending.clear()
            self.in_flight = self.writer.next_id(), Delta(choices, prompt_tokens)
        return self.in_flight

    def appended(self) -> None:
        """The entry in flight is in the stream."""
        assert self.in_flight is not None
        _, delta = self.in_flight
        self.in_flight = None
        if any(choice.token_ids for choice in delta.choices):
            self.latest_token_at = time.monotonic()
            if self.first_token_at is None:
                self.first_token_at = self.latest_token_at

    @property
    def produced_for(self) -> float:
        """Seconds between the first new token in the stream and the latest."""
        return 0.0 if self.first_token_at is None else self.latest_token_at - self.first_token_at


class Publisher:
    """The one writer of deltas in a worker."""

    def __init__(self, streams: TokenStreams, interval: int = 1) -> None:
        """`interval`: steps of a request that make an entry. One that has as many takes all others along, so
        that they keep in step."""
        self._streams = streams
        self._interval = interval
        self._ready: dict[int, Outbox] = {}
        self._work = asyncio.Event()

    def publish(self, outbox: Outbox, choices: list[ChoiceDelta], prompt_tokens: int | None = None) -> None:
        """Queues what a step added to a request."""
        outbox.pending.append(Delta(choices, prompt_tokens))
        outbox.empty.clear()
        self._ready[id(outbox)] = outbox
        if self._is_due(outbox):
            self._work.set()

    async def finish(self, outbox: Outbox) -> None:
        """Returns when all is sent: what there is, and what still comes meanwhile."""
        outbox.hurries = True
        while not outbox.empty.is_set():
            self._work.set()
            await outbox.empty.wait()

    def _is_due(self, outbox: Outbox) -> bool:
        """Nobody waits for a first token, or a last one, longer than needed."""
        if outbox.hurries or outbox.first_token_at is None or len(outbox.pending) >= self._interval:
            return True
        return any(choice.finish_reason for choice in outbox.pending[-1].choices)

    def discard(self, outbox: Outbox) -> None:
        """Forgets what has not been sent: the attempt is over."""
        outbox.pending.clear()
        outbox.in_flight = None
        outbox.empty.set()
        self._ready.pop(id(outbox), None)

    async def run(self) -> None:
        """Sends for as long as the worker runs."""
        while True:
            await self._work.wait()
            self._work.clear()
            await persist(self._send)

    async def _send(self) -> None:
        """One command with the next entry of every outbox.

        Raises:
            RedisError: an outcome is unknown; the same entries are sent again by the next call.
        """
        batch = [(outbox, *outbox.take()) for outbox in self._ready.values()]
        if not batch:
            return
        replies = await self._streams.append(
            [(outbox.writer.job_id, entry_id, delta) for outbox, entry_id, delta in batch]
        )
        again = False
        for (outbox, entry_id, _), reply in zip(batch, replies, strict=True):
            if outbox.in_flight is None or outbox.in_flight[0] != entry_id:
                continue  # discarded while it was under way
            try:
                if not isinstance(reply, bytes):  # the entry's id: nearly always it is
                    await self._streams.check_reply(outbox.writer, entry_id, reply)
            except StreamEnded as ended:
                self.discard(outbox)
                outbox.on_end(ended)
            except Exception as error:
                if not is_passing(error):
                    logger.exception("entry %s of %s failed", entry_id, outbox.writer.job_id)
                again = True
            else:
                if outbox.in_flight is None:
                    continue  # discarded while the newest entry was read
                outbox.appended()
                if outbox.pending:
                    if self._is_due(outbox):
                        self._work.set()
                else:
                    outbox.empty.set()
                    del self._ready[id(outbox)]
        if again:
            raise RedisConnectionError("some entries were not accepted")
