"""The local states of actors: what can happen next to one depends on where it stands, not on its way there.

That way is its history, and feeding it to a fresh actor brings it there again: a coroutine can't be
copied.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import msgspec
from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost.jobs import GenerationJob
from tests.integration.protocol.actors import Actor, Call, Facts, Worker
from tests.integration.protocol.wire import Loop

Event = tuple[str, int, int]
"""What happens to an actor: ("reply", which request, number of the reply), ("fail", which request, 0) or
(cue, 0, 0)."""


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
        there = self._locals.get(self._key(local.kind, actor))
        assert there is local, f"its key doesn't say all that matters: {local.history} led elsewhere before"
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
        if history and not actor.busy:
            return self.new(kind)
        key = self._key(kind, actor)
        local = self._locals.get(key)
        if local is None:
            requests = tuple(request.raw for request in actor.requests)
            local = Local(len(self._locals), kind, history, requests, actor.facts(), actor.busy)
            self._locals[key] = local
        self._standing.setdefault(local.id, actor)
        return local

    def _key(self, kind: str, actor: Actor) -> Any:
        """Equal for actors whose futures are the same."""
        if not actor.busy:
            return (kind, None)
        requests = tuple(request.raw for request in actor.requests)
        stacks = sorted((_stack(task) for task in actor.loop.living()), key=repr)
        return (kind, requests, actor.facts(), shape(actor.memory()), tuple(stacks))


def _stack(task: "asyncio.Task[Any]") -> tuple[Any, ...]:
    """Where a task stands and, in our own code, with what in its hands. What libraries hold is a request,
    which is known, or something for their logs."""
    frames = []
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        code, held = frame.f_code, []
        if frame.f_globals["__name__"].startswith("llmboost"):  # its file says where it was cloned to, too
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
