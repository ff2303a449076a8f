"""The protocol as a graph: states of a server, two workers, a client, a reaper and the wires between them.

A move is one request that arrives, or one thing that happens to a process. Some are disturbances.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from llmboost import keys
from llmboost.jobs import Prompt
from tests.integration.protocol.actors import RECLAIMER
from tests.integration.protocol.places import Actors, Local
from tests.integration.protocol.server import Keyspace, Server, commands, pack
from tests.jobs import MODEL, make_job

DISTURBANCES = frozenset({"break", "lapse", "kill", "terminate", "cancel", "deadline", "expire", "empty"})
"""break: a connection breaks while a request is on its way: its sender can't know whether it will arrive, and
it may arrive at any later time or never. That is a lost reply, a lost request, a duplicate and a delay in
one. lapse: a lease lapses though its worker lives (a frozen one). kill, terminate: SIGKILL and SIGTERM to a
worker, which is replaced. cancel: by the client. deadline: the request's time is over. expire: its stream is
gone. empty: the server is back without its data."""


class State(NamedTuple):
    """Of everything; small numbers, so that many fit."""

    server: int
    workers: tuple[int, ...]
    calls: tuple[int, ...]
    flying: tuple[bytes, ...]
    """Requests on broken connections: each may still arrive."""


@dataclass(frozen=True)
class Move:
    """What may happen next."""

    name: str
    disturbs: bool
    to: State

    @property
    def late(self) -> bool:
        """Whether it is one that may as well never happen."""
        return self.name.startswith("a late request")


class Model:
    """Two workers and some short jobs on one server."""

    def __init__(
        self,
        server: Server,
        *,
        tokens: int,
        jobs: int = 1,
        slots: int = 1,
        batch: int = 0,
        disturbances: frozenset[str] = DISTURBANCES,
    ) -> None:
        """`batch`: so many of the jobs, the first ones, give way to the others."""
        self.server = server
        self.tokens = tokens
        self.disturbances = disturbances
        self.jobs = [
            make_job(
                id=f"job-{number}",
                prompt=Prompt(token_ids=[1 + number]),
                max_tokens=tokens,
                job_class="batch" if number < batch else "interactive",
                needs_audience=False,
                lasts=3600.0,
            )
            for number in range(jobs)
        ]
        self.actors = Actors(server.replies, self.jobs, slots)
        self.locals: dict[int, Local] = {}
        workers = tuple(self._keep(self.actors.new(f"worker-{number}")) for number in (1, 2))
        calls = tuple(self._begin(number, "submit") for number in range(jobs))
        self.start = State(server.empty, workers, calls, ())
        self._submissions = {request for number in calls for request in self.locals[number].requests}

    def _keep(self, local: Local) -> int:
        self.locals[local.id] = local
        return local.id

    def _begin(self, job: int, cue: str) -> int:
        local, _ = self.actors.after(self.actors.new(str(job)), (cue, 0, 0))
        return self._keep(local)

    # Moves

    def moves(self, state: State, *, calm: bool) -> Iterator[Move]:
        """All that may happen next, and where it leads; if `calm`, only what disturbs nothing."""
        may = frozenset() if calm else self.disturbances
        keyspace = self.server.keyspaces[state.server]
        for at, number in enumerate(state.workers):
            yield from self._of_worker(state, keyspace, at, self.locals[number], may)
        for at, number in enumerate(state.calls):
            local = self.locals[number]
            yield from self._of_requests(state, local, "calls", at, f"a call about job {local.kind}", may)
        for at, request in enumerate(state.flying):
            _, server = self.server.apply(state.server, request)
            rest = state.flying[:at] + state.flying[at + 1 :]
            yield self._move(f"a late request arrives: {_told(request)}", False, state, server, flying=rest)
        yield from self._of_world(state, keyspace, may)

    def _of_worker(
        self, state: State, keyspace: Keyspace, at: int, local: Local, may: frozenset[str]
    ) -> Iterator[Move]:
        yield from self._of_requests(state, local, "workers", at, local.kind, may)
        facts = local.facts
        cues = []
        # Before the first claim the workers differ in nothing but their names.
        alike = at > 0 and not self.locals[state.workers[0]].busy and _unclaimed(keyspace)
        if facts.can_poll and keyspace.waiting and not alike:
            cues.append("poll")
        if facts.can_step:
            cues.append("step")
        if facts.can_renew and any(keyspace.leased.get(job, True) for job, _ in facts.holds):
            cues.append("renew")  # at any other time it changes nothing
        if "terminate" in may and local.busy and facts.can_leave:
            cues.append("terminate")
        for cue in cues:
            after, orphans = self.actors.after(local, (cue, 0, 0))
            if after is not local:
                yield self._placed(
                    f"{local.kind}: {cue}", cue == "terminate", state, "workers", at, after, orphans=orphans
                )
        if "kill" in may and local.busy:
            fresh = self.actors.new(local.kind)
            yield self._placed(
                f"{local.kind} is killed", True, state, "workers", at, fresh, orphans=local.requests
            )

    def _of_requests(
        self, state: State, local: Local, side: str, at: int, name: str, may: frozenset[str]
    ) -> Iterator[Move]:
        for which, request in enumerate(local.requests):
            reply, server = self.server.apply(state.server, request)
            after, orphans = self.actors.after(local, ("reply", which, reply))
            told = f"{name}: {_told(request)} -> {self.server.replies[reply]}"
            yield self._placed(told, False, state, side, at, after, server, orphans)
            if "break" in may:
                after, orphans = self.actors.after(local, ("fail", which, 0))
                yield self._placed(
                    f"{name}: the connection breaks on {_told(request)}",
                    True,
                    state,
                    side,
                    at,
                    after,
                    orphans=(*orphans, request),
                )

    def _of_world(self, state: State, keyspace: Keyspace, may: frozenset[str]) -> Iterator[Move]:
        leased = keyspace.leased
        # A submission outlasts no stream: its sender gives up long before a TTL has passed. (Were the server
        # to lose its data and be sent the same job again, attempts would be counted from 1 again.)
        under_way = {request for number in state.calls for request in self.locals[number].requests}
        submitting = self._submissions & under_way.union(state.flying)
        held = {pair for number in state.workers for pair in self.locals[number].facts.holds}
        for job in self.jobs:
            if leased.get(job.id) is False:
                known = (job.id, int(keyspace.claim(job.id).get("attempt", 0))) in held
                if not known or "lapse" in may:
                    # A lease that nobody knows of lapses sooner or later, with nothing going wrong.
                    lapse = pack("ZADD", keys.leases(MODEL), 0, job.id)
                    yield self._happens(f"the lease of {job.id} lapses", known, state, lapse)
            if job.id in keyspace.logs and not keyspace.sealed(job.id):
                if "deadline" in may and keyspace.open.get(job.id) is False:
                    over = pack("ZADD", keys.OPEN, 0, job.id)
                    yield self._happens(f"the deadline of {job.id} passes", True, state, over)
                if "expire" in may and not submitting:
                    gone = pack("DEL", keys.stream(job.id))
                    yield self._happens(f"the stream of {job.id} expires", True, state, gone)
        if "empty" in may and keyspace.kinds and not submitting:
            yield self._happens("the server has lost its data", True, state, pack("FLUSHDB"))
        holders = {keyspace.claim(job).get("owner") for job in leased}
        for number in state.workers:
            local = self.locals[number]
            probation = keys.probation(local.kind)
            if probation in keyspace.kinds and not local.facts.on_probation and local.kind not in holders:
                # As a lease that nobody knows of: two leases after that of the job.
                over = pack("DEL", probation)
                yield self._happens(f"the probation of {local.kind} runs out", False, state, over)
        about = {self.locals[number].kind for number in state.calls}
        for number, job in enumerate(self.jobs):
            if str(number) in about:
                continue
            if job.id in keyspace.open and "cancel" in may:
                yield self._called(state, number, "cancel", True)
        if "0" not in about:
            placed = keyspace.waiting | leased.keys()
            if any(past or job not in placed for job, past in keyspace.open.items()):
                yield self._called(state, 0, "reap", False)
        if any(leased.values()):
            reclaimer, _ = self.actors.after(self.actors.new("0"), ("reclaim", 0, 0))
            # Only a worker may that has been in contact for a whole lease, which is another matter.
            contact = keys.contact(RECLAIMER)
            for request in reclaimer.requests:
                reclaim = pack("SET", contact, 1) + request + pack("DEL", contact)
                yield self._happens("lapsed leases are reclaimed", False, state, reclaim)

    def _called(self, state: State, job: int, cue: str, disturbs: bool) -> Move:
        calls = (*state.calls, self._begin(job, cue))
        return self._move(f"somebody begins to {cue}", disturbs, state, state.server, calls=calls)

    def _happens(self, name: str, disturbs: bool, state: State, request: bytes) -> Move:
        _, server = self.server.apply(state.server, request)
        return self._move(name, disturbs, state, server)

    def _placed(
        self,
        name: str,
        disturbs: bool,
        state: State,
        side: str,
        at: int,
        local: Local,
        server: int | None = None,
        orphans: tuple[bytes, ...] = (),
    ) -> Move:
        """A move that leads one actor into another local state."""
        numbers: tuple[int, ...] = getattr(state, side)
        here = () if side == "calls" and not local.busy else (self._keep(local),)
        numbers = numbers[:at] + here + numbers[at + 1 :]
        flying = tuple(sorted(state.flying + orphans)) if orphans else state.flying
        return self._move(
            name,
            disturbs,
            state,
            state.server if server is None else server,
            flying=flying,
            **{side: numbers},
        )

    def _move(
        self,
        name: str,
        disturbs: bool,
        state: State,
        server: int,
        *,
        workers: tuple[int, ...] | None = None,
        calls: tuple[int, ...] | None = None,
        flying: tuple[bytes, ...] | None = None,
    ) -> Move:
        to = State(
            server,
            state.workers if workers is None else workers,
            state.calls if calls is None else calls,
            state.flying if flying is None else flying,
        )
        return Move(name, disturbs, to)


def _unclaimed(keyspace: Keyspace) -> bool:
    return all(of.get("attempt") == "0" for key, of in keyspace.hashes.items() if ":claim:" in key)


@cache
def _told(request: bytes) -> str:
    """A request, for a reader."""
    told = []
    for command in commands(request):
        words = [word.decode(errors="replace") for word in command]
        if words[0] == "EVALSHA":
            words = [words[0], *words[3:]]
        told.append(" ".join(words))
    return "; ".join(told)
