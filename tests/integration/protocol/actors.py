"""Workers, a client and a reaper: the product's own code over a wire that a test holds in its hands.

An actor runs until it can do no more but wait for a reply, or for its next cue.
"""

import asyncio
import contextlib
import signal
import traceback
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, cast

from arq.connections import ArqRedis
from arq.worker import RetryJob, func
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from llmboost.connection import deserialize, serialize
from llmboost.entries import StreamError, Terminal
from llmboost.jobs import FUNCTION, GenerationJob, OpaqueJob, Prompt
from llmboost.queue import JobQueue
from llmboost.streams import StreamFenced, TokenStreams, persist, position
from llmboost_worker.generation import GaveWay, Generator
from llmboost_worker.leased import LeasedWorker, current_claim
from llmboost_worker.publisher import Outbox, Publisher
from llmboost_worker.text import encode_prompt
from tests.engines import ScriptedEngine
from tests.integration.conftest import RETENTION_S
from tests.integration.protocol.server import commands
from tests.integration.protocol.wire import Loop, Request, Wire
from tests.jobs import MODEL
from tests.unit.text_tokenizers import byte_level

LEASE_S = 3600.0
"""No lease lapses by itself."""
MAX_TRIES = 3
RECLAIMER = "reclaimer"
"""A worker that has never been out of contact."""

VOCABULARY = encode_prompt(byte_level(), Prompt(text="etaoinshrdlu", add_special_tokens=False))


class Actor:
    """A process, or a call that one makes."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        pool = ConnectionPool(connection_class=Wire, actor=self)
        self.redis = ArqRedis(pool, job_serializer=serialize, job_deserializer=deserialize)
        self.streams = TokenStreams(self.redis, RETENTION_S)
        self.queue = JobQueue(self.redis, self.streams)
        self.loop = cast(Loop, asyncio.get_running_loop())
        self.calls: list[asyncio.Task[Any]] = []
        self._tried: dict[bytes, int] = {}
        """By key of a stream: the latest attempt that this process has written for."""
        self._over: dict[bytes, int] = {}
        """By key of a stream: attempts below this were seen to be over when one of them looked."""
        self.wrong: list[str] = []
        self.loop.set_exception_handler(self._on_exception)

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """In a callback, such as the engine's: nobody else would see it. (The loop also tells of tasks that
        were left with an error; here all are left.)"""
        error = context.get("exception")
        if "handle" in context and error is not None:
            self.wrong.append("".join(traceback.format_exception_only(error)).strip())

    def sent(self, request: "Request") -> None:
        """A request is on its way."""
        self.requests.append(request)
        for command in commands(request.raw):
            if command[0] != b"XADD":
                continue
            attempt = position(command[3])[0]
            self._tried[command[1]] = max(attempt, self._tried.get(command[1], 0))
            if attempt < self._over.get(command[1], 0):
                self.wrong.append(f"it has seen that attempt {attempt} is over, and still writes")

    def answer(self, which: int, replies: list[Any]) -> None:
        """One of the requests is answered."""
        request = self.requests.pop(which)
        request.reply.set_result(replies)
        for command, reply in zip(commands(request.raw), replies, strict=True):
            if command[0] == b"XREVRANGE" and reply:
                newest, tried = position(reply[0][0])[0], self._tried.get(command[1], 0)
                self._over[command[1]] = min(newest, tried + 1)

    def cue(self, name: str) -> None:
        """Begins something."""
        raise NotImplementedError

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> "asyncio.Task[None]":
        """Runs something that Redis may interrupt."""

        async def run() -> None:
            with contextlib.suppress(RedisError, OSError):
                await coroutine

        self.calls = [call for call in self.calls if not call.done()]
        self.calls.append(self.loop.create_task(run()))
        return self.calls[-1]

    @property
    def busy(self) -> bool:
        """Whether anything has been begun and not ended."""
        return bool(self.requests) or not all(call.done() for call in self.calls)

    def facts(self) -> "Facts":
        return Facts()

    def memory(self) -> Any:
        """All that it knows beyond what is on the stacks of its tasks."""
        return ()


@dataclass(frozen=True)
class Facts:
    """What a search must know of an actor, besides its requests."""

    holds: tuple[tuple[str, int], ...] = ()
    """Jobs and attempts whose leases it renews."""
    written: tuple[tuple[str, str], ...] = ()
    """Jobs and ids of entries that it believes to be in the log."""
    wrong: tuple[str, ...] = ()
    """What it must not have done."""
    on_probation: bool = False
    """As far as it knows."""
    can_poll: bool = False
    can_step: bool = False
    can_renew: bool = False
    can_leave: bool = False


class NotingPublisher(Publisher):
    """Remembers what it was told to forget: of those attempts nobody believes anything any more."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.discarded: set[tuple[str, int]] = set()

    def discard(self, outbox: Outbox) -> None:
        self.discarded.add((outbox.writer.job_id, outbox.writer.attempt))
        super().discard(outbox)


class Worker(Actor):
    """A worker process, but for its model, its timers and its signals: those are cues."""

    def __init__(self, name: str, slots: int) -> None:
        super().__init__()
        self.engine = ScriptedEngine(VOCABULARY, max_num_seqs=slots)
        self.publisher = NotingPublisher(self.streams)
        self.generator = Generator(
            self.engine, self.engine.info, byte_level(), self.streams, self.publisher, name
        )
        self.engine.start(self.generator.deliver, lambda error: None)
        self.arq = LeasedWorker(
            self.queue,
            model=MODEL,
            owner=name,
            lease=LEASE_S,
            max_tries=MAX_TRIES,
            max_jobs=slots,
            redis_pool=self.redis,
            functions=[func(self._generate, name=FUNCTION)],
            handle_signals=False,
        )
        self.arq.on_lost = lambda job_id: self.generator.end(job_id, StreamFenced("the lease was lost"))
        self.background = self.loop.create_task(self.publisher.run())
        self.under_way: dict[str, asyncio.Task[None]] = {}
        """Of polls and heartbeats the last: there is one at a time."""
        self.leaving = False

    async def _generate(self, ctx: dict[Any, Any], opaque: OpaqueJob) -> None:
        try:
            await self.generator.run(opaque.decode(), current_claim.get().attempt)
        except GaveWay:
            raise RetryJob from None

    def cue(self, name: str) -> None:
        match name:
            case "poll":
                self.arq.main_task = self.under_way[name] = self.call(self.arq._claim_or_wait())
            case "step":
                self.engine.step()
            case "renew":
                self.under_way[name] = self.call(self.arq.renew())
            case "terminate":
                self.leaving = True
                self.arq.handle_sig(signal.SIGTERM)

    @property
    def busy(self) -> bool:
        return super().busy or bool(self.arq.claims) or any(not t.done() for t in self.arq.tasks.values())

    @property
    def _generations(self) -> list[Any]:
        return list(self.generator.running.values())

    def _rests(self, cue: str) -> bool:
        return cue not in self.under_way or self.under_way[cue].done()

    def facts(self) -> Facts:
        written = []
        for generation in self._generations:
            writer, flying = generation.outbox.writer, generation.outbox.in_flight
            if (writer.job_id, writer.attempt) in self.publisher.discarded:
                continue
            ids = [writer.fence_id, *(f"{writer.attempt}-{n + 1}" for n in range(writer.n))]
            written += [(writer.job_id, id_) for id_ in ids if flying is None or flying[0] != id_]
        return Facts(
            tuple((claim.job_id, claim.attempt) for claim in self.arq.claims.values()),
            tuple(written),
            (*self.wrong, *(["its publisher has ended"] if self.background.done() else [])),
            on_probation=self.arq._probation is not None,
            can_poll=not self.leaving and self._rests("poll") and any(self.arq.room().values()),
            can_step=bool(self.engine.sequences),
            can_renew=self._rests("renew"),
            can_leave=not self.leaving,
        )

    def memory(self) -> Any:
        return (
            self._tried,
            self._over,
            sorted(self.publisher.discarded),
            self.leaving,
            self.arq.claims,
            list(self.arq.tasks),
            sorted(self.arq._settling),
            self.arq._probation,
            self._generations,
            list(self.publisher._ready.values()),
            [(name, output) for name, (_, output) in self.engine.sequences.items()],
        )


class Call(Actor):
    """A client that submits or cancels, a process that reaps or reclaims: one call each."""

    def __init__(self, job: GenerationJob) -> None:
        super().__init__()
        self.job = job

    def cue(self, name: str) -> None:
        match name:
            case "submit":
                self.call(persist(lambda: self.queue.submit(self.job)))
            case "cancel":
                cancelled = Terminal("client", error=StreamError("cancelled", code="request_cancelled"))
                self.call(self.queue.cancel(self.job.id, cancelled))
            case "reap":
                self.call(self.queue.reap("reaper"))
            case "reclaim":
                self.call(self.queue.reclaim(MODEL, RECLAIMER, LEASE_S, MAX_TRIES))
