"""Workers, a client and a reaper: the product's own code over a wire that a test holds in its hands.

An actor runs until it can do no more but wait for a reply, or for its next cue. What it waits for is all that
a search need know of it; how it got there is its history, and feeding that to a fresh actor brings it there
again. Time is the loop's own: a pause before a retry takes none.
"""

import asyncio
import traceback
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import msgspec
from arq.connections import ArqRedis
from arq.worker import func
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from llmboost import keys
from llmboost.connection import deserialize, serialize
from llmboost.entries import StreamError, Terminal
from llmboost.jobs import FUNCTION, GenerationJob, OpaqueJob, Prompt
from llmboost.queue import JobQueue
from llmboost.streams import StreamFenced, TokenStreams, persist, position
from llmboost_worker.generation import Generator
from llmboost_worker.leased import LeasedWorker
from llmboost_worker.publisher import Outbox, Publisher
from llmboost_worker.text import encode_prompt
from tests.engines import ScriptedEngine
from tests.integration.conftest import RETENTION_S
from tests.integration.protocol.server import commands
from tests.jobs import MODEL
from tests.unit.text_tokenizers import byte_level

LEASE_S = 3600.0
"""No lease lapses by itself."""

VOCABULARY = encode_prompt(byte_level(), Prompt(text="etaoinshrdlu", add_special_tokens=False))

Event = tuple[str, int, int]
"""What happens to an actor: ("reply", which request, number of the reply), ("fail", which request, 0) or
(cue, 0, 0)."""


class Wire(AbstractConnection):
    """A connection whose requests wait in `requests` until somebody answers or breaks them."""

    def __init__(self, *, actor: "Actor", **options: Any) -> None:
        super().__init__(**options)
        self._actor = actor
        self._replies: deque[Any] = deque()
        self._request: Request | None = None
        self._connected = False

    def repr_pieces(self) -> list[tuple[str, str]]:
        return []

    @property
    def is_connected(self) -> bool:
        return self._connected

    async def _connect(self) -> None:
        self._connected = True

    async def connect(self) -> None:
        self._connected = True

    async def disconnect(self, nowait: bool = False) -> None:
        self._connected = False
        self._replies.clear()

    async def can_read_destructive(self) -> bool:
        return False

    async def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        data = command.encode() if isinstance(command, str) else command
        raw = data if isinstance(data, bytes) else b"".join(data)
        self._request = Request(raw, asyncio.get_running_loop().create_future())
        if b"BLPOP" in raw:
            self._request.reply.set_result([None])  # whether to look again is the search's to say
        else:
            self._actor.sent(self._request)

    async def read_response(self, *args: Any, **options: Any) -> Any:
        if not self._replies:
            assert self._request is not None
            try:
                self._replies.extend(await self._request.reply)
            except BaseException:
                await self.disconnect()
                raise
        reply = self._replies.popleft()
        if isinstance(reply, Exception):
            raise reply
        return reply


@dataclass(eq=False)
class Request:
    """What was sent and not yet answered."""

    raw: bytes
    reply: "asyncio.Future[list[Any]]"


def _told(context: dict[str, Any]) -> str:
    error = context.get("exception")
    where = traceback.extract_tb(error.__traceback__)[-1] if error and error.__traceback__ else ""
    return f"{context['message']}: {error!r} {where}"


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
        self.loop.set_exception_handler(lambda _, context: self.wrong.append(_told(context)))

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
            try:
                await coroutine
            except (RedisError, OSError):
                pass

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
        self.engine = ScriptedEngine(VOCABULARY)
        self.publisher = NotingPublisher(self.redis, self.streams)
        self.generator = Generator(
            self.engine, self.engine.info, byte_level(), self.streams, self.publisher, name
        )
        self.engine.start(self.generator.deliver, lambda error: None)
        self.arq = LeasedWorker(
            self.queue,
            model=MODEL,
            owner=name,
            lease=LEASE_S,
            max_tries=3,
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
        claim = self.arq.claims.get(ctx["job_id"])
        if claim is not None:
            await self.generator.run(opaque.decode(), claim.attempt)

    def cue(self, name: str) -> None:
        match name:
            case "poll":
                self.under_way[name] = self.call(self.arq._claim_or_wait())
            case "step":
                self.engine.step()
            case "renew":
                self.under_way[name] = self.call(self.arq.renew())
            case "terminate":
                self.leaving = True
                self.arq.handle_sig(15)  # type: ignore[arg-type]
                for call in self.calls:
                    call.cancel()

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
            can_poll=not self.leaving and self._rests("poll") and self.arq.job_counter < self.arq.max_jobs,
            can_step=bool(self.engine.sequences),
            can_renew=self._rests("renew"),
            can_leave=not self.leaving,
        )

    def memory(self) -> Any:
        return (
            self._tried,
            self._over,
            self.leaving,
            self.arq.claims,
            sorted(self.arq._settling),
            self.arq.job_counter,
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
                self.call(self.queue.reclaim(MODEL))


@dataclass(frozen=True)
class Local:
    """What can happen next to an actor depends on this alone."""

    id: int
    kind: str
    history: tuple[Event, ...]
    """One of the ways here."""
    requests: tuple[bytes, ...]
    facts: Facts
    busy: bool
    """False: as good as new."""


class Actors:
    """All local states of all actors that a search has met."""

    def __init__(self, replies: list[list[Any]], jobs: list[GenerationJob], slots: int = 1) -> None:
        self._replies = replies
        self._jobs = jobs
        self._slots = slots
        self._locals: dict[Any, Local] = {}
        self._known: dict[tuple[int, Event], tuple[Local, tuple[bytes, ...]]] = {}
        self._standing: dict[int, Actor] = {}
        """Actors that stand in a local state, by its id."""

    def new(self, kind: str) -> Local:
        """A worker by its name, or a call about a job by the job's number."""
        return self._locals.get((kind, None)) or self._register(kind, (), self._make(kind))

    def after(self, local: Local, event: Event) -> tuple[Local, tuple[bytes, ...]]:
        """The next local state, and requests in flight whose sender no longer waits for the reply."""
        known = self._known.get((local.id, event))
        if known is None:
            actor = self._standing.pop(local.id, None) or self._replay(local)
            orphans = self._happen(actor, event)
            known = self._register(local.kind, (*local.history, event), actor), orphans
            self._known[local.id, event] = known
        return known

    def _make(self, kind: str) -> Actor:
        async def make() -> Actor:
            return Worker(kind, self._slots) if kind.startswith("worker") else Call(self._jobs[int(kind)])

        return Loop().run_until_complete(make())

    def _replay(self, local: Local) -> Actor:
        actor = self._make(local.kind)
        for event in local.history:
            self._happen(actor, event)
        return actor

    def _happen(self, actor: Actor, event: Event) -> tuple[bytes, ...]:
        what, which, number = event
        if what == "reply":
            actor.answer(which, list(self._replies[number]))
        elif what == "fail":
            actor.requests.pop(which).reply.set_exception(RedisConnectionError("the connection broke"))
        else:
            actor.loop.call_soon(actor.cue, what)
        actor.loop.run_forever()
        orphans = [request for request in actor.requests if request.reply.cancelled()]
        for request in orphans:
            actor.requests.remove(request)
        return tuple(request.raw for request in orphans)

    def _register(self, kind: str, history: tuple[Event, ...], actor: Actor) -> Local:
        requests = tuple(request.raw for request in actor.requests)
        busy = actor.busy
        key: Any = (kind, None)
        if busy:
            stacks = sorted((_stack(task) for task in actor.loop.living()), key=repr)
            key = (kind, requests, actor.facts(), shape(actor.memory()), tuple(stacks))
        elif history:
            return self.new(kind)
        local = self._locals.get(key)
        if local is None:
            local = self._locals[key] = Local(
                len(self._locals), kind, history, requests, actor.facts(), busy
            )
        self._standing.setdefault(local.id, actor)
        return local


class Loop(asyncio.BaseEventLoop):
    """Runs until nothing but the world outside can go on; its clock jumps over what it would sleep."""

    PATIENCE_S = 5.0
    """Nothing here pauses longer before it tries again."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self
        self._tasks: list[asyncio.Task[Any]] = []
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None or timeout > self.PATIENCE_S:
            self.stop()
        else:
            self._now += timeout
        return []

    def _process_events(self, events: list[Any]) -> None:
        pass

    def __del__(self) -> None:
        pass  # holds nothing that must be closed

    def create_task(self, *args: Any, **options: Any) -> Any:
        task = super().create_task(*args, **options)
        task._log_destroy_pending = False  # actors are left where they stand
        self._tasks.append(task)
        return task

    def living(self) -> "list[asyncio.Task[Any]]":
        """Tasks that have not ended. `asyncio.all_tasks` looks through those of all loops."""
        self._tasks = [task for task in self._tasks if not task.done()]
        return self._tasks


def _stack(task: "asyncio.Task[Any]") -> tuple[Any, ...]:
    """Where a task stands and, in our own code, with what in its hands. What libraries hold is a request, which
    is known, or something for their logs."""
    frames = []
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        code, held = frame.f_code, []
        if "/llmboost" in code.co_filename:
            held = sorted(each for each in frame.f_locals.items() if each[0] not in USED_UP)
        frames.append((code.co_qualname, frame.f_lasti, tuple((name, shape(value)) for name, value in held)))
        awaited = awaited.cr_await
    return tuple(frames)


USED_UP = {"self", "transcript", "result_data"}
"""Variables that matter no more where a task waits: the log has by then become the state of a generation."""


def shape(value: Any, depth: int = 8) -> Any:
    """A value by its contents, comparable and hashable. Times and delays are left out, and of what is
    neither plain data nor a future the type is all that counts."""
    kind = type(value).__name__
    if value is None or isinstance(value, str | bytes | bool):
        return value
    if isinstance(value, int):
        return value if value < 10**11 else "time"
    if depth == 0:
        return kind
    if isinstance(value, dict):
        return (kind, *((shape(k, depth - 1), shape(v, depth - 1)) for k, v in value.items()))
    if isinstance(value, list | tuple | deque):
        return (kind, *(shape(each, depth - 1) for each in value))
    if isinstance(value, BaseException):
        return kind, str(value)
    if isinstance(value, asyncio.Future):
        if not value.done() or value.cancelled():
            return kind, value.done()
        return kind, shape(value.exception() or value.result(), depth - 1)
    if isinstance(value, msgspec.Struct):
        return (kind, *(shape(getattr(value, name), depth - 1) for name in value.__struct_fields__))
    if is_dataclass(value):
        return (kind, *(shape(getattr(value, each.name), depth - 1) for each in fields(value)))
    return kind
