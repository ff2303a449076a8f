"""The protocol as a graph: states of a server, two workers, a client, a reaper and the wires between them.

A move is one request that arrives, or one thing that happens to a process. Disturbances are moves too: a
search takes up to so many of them on one way, and any number of the others. It goes through states in order of
disturbances, so a way that it reports as broken is one with the fewest.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from llmboost import keys
from llmboost.entries import Delta, Queued, Started, Terminal
from llmboost.jobs import GenerationJob, Prompt
from llmboost.streams import QUEUED_ID, StreamGap, Transcript, position
from llmboost_worker.engine.interface import SequenceRequest
from tests.engines import scripted_token
from tests.integration.protocol.actors import VOCABULARY, Actors, Local
from tests.integration.protocol.server import Keyspace, Server, commands, pack
from tests.jobs import MODEL, make_job
from tests.unit.text_tokenizers import byte_level

DISTURBANCES = frozenset({"break", "lapse", "kill", "terminate", "cancel", "deadline", "expire", "empty"})
"""break: a connection breaks while a request is on its way: its sender can't know whether it will arrive, and it
may arrive at any later time or never. That is a lost reply, a lost request, a duplicate and a delay in one.
lapse: a lease lapses though its worker lives (a frozen one). kill, terminate: SIGKILL and SIGTERM to a worker,
which is replaced. cancel: by the client. deadline: the request's time is over. expire: its stream is gone.
empty: the server is back without its data."""


class Broken(AssertionError):
    """A state, or a way to it, that the protocol forbids."""


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


class Model:
    """Two workers and some short jobs on one server."""

    def __init__(
        self,
        server: Server,
        *,
        tokens: int,
        jobs: int = 1,
        slots: int = 1,
        disturbances: frozenset[str] = DISTURBANCES,
    ) -> None:
        self.server = server
        self.tokens = tokens
        self.disturbances = disturbances
        self.jobs = [
            make_job(
                id=f"job-{number}",
                prompt=Prompt(token_ids=[1 + number]),
                max_tokens=tokens,
                needs_audience=False,
                lasts=3600.0,
            )
            for number in range(jobs)
        ]
        self.actors = Actors(server.replies, self.jobs, slots)
        self.locals: dict[int, Local] = {}
        self._checked: set[object] = set()
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
        """All that may happen next, and where it leads; if `calm`, only what disturbs nothing.

        Raises:
            Broken: it leads where it must not.
        """
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
        # A submission outlasts no stream: its sender gives up long before a TTL has passed. (Were the server to
        # lose its data and be sent the same job again, attempts would be counted from 1 again.)
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
            local, _ = self.actors.after(self.actors.new("0"), ("reclaim", 0, 0))
            yield self._happens("lapsed leases are reclaimed", False, state, local.requests[0])

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

    # What must hold

    def check(self, before: State, move: Move) -> None:
        """Raises `Broken` if a move, or the state that it leads to, is against the protocol."""
        state = move.to
        if state.server not in self._checked:
            self._check_keyspace(self.server.keyspaces[state.server])
            self._checked.add(state.server)
        if before.server != state.server:
            self._check_step(before.server, state.server, lossy=move.disturbs)
        for number in state.workers:
            if (state.server, number) not in self._checked:
                self._check_belief(self.server.keyspaces[state.server], self.locals[number])
                self._checked.add((state.server, number))

    def _check_keyspace(self, keyspace: Keyspace) -> None:
        leased, open_ = keyspace.leased, keyspace.open
        queues = [key for key in keyspace.sets if ":queue:" in key]
        for job in self.jobs:
            places = [key for key in queues if job.id in dict(keyspace.sets[key])]
            _demand(len(places) + (job.id in leased) <= 1, f"{job.id} is in {places} and leased")
            log = keyspace.logs.get(job.id)
            if log is None:
                continue
            self._check_log(job, log)
            if keyspace.sealed(job.id):
                _demand(job.id not in open_, f"{job.id} is sealed but still in the index of open streams")
                continue
            _demand(job.id in open_, f"{job.id} is open but the reaper's index doesn't have it")
            _demand(keys.arq_job(job.id) in keyspace.kinds, f"{job.id} was deleted, but its stream is open")
            newest = position(log[-1][0])[0]
            attempt = int(keyspace.claim(job.id).get("attempt", -1))
            _demand(attempt >= newest, f"{job.id}: the next attempt is {attempt + 1}, after {newest}")

    def _check_log(self, job: GenerationJob, log: list[tuple[str, object]]) -> None:
        ids = [position(entry_id) for entry_id, _ in log]
        _demand(all(a < b for a, b in zip(ids, ids[1:])), f"ids don't rise: {ids}")
        _demand(log[0][0] == QUEUED_ID and isinstance(log[0][1], Queued), f"{job.id} has no beginning")
        expected = self.expected[job.id]
        transcript, text = Transcript(), ""
        attempt = 0
        for entry_id, entry in log:
            _demand(transcript.terminal is None, f"entry {entry_id} follows the terminal one")
            try:
                transcript.apply(entry_id, entry)  # type: ignore[arg-type]
            except StreamGap as gap:
                raise Broken(str(gap)) from gap
            if isinstance(entry, Started):
                attempt, first = position(entry_id)
                _demand(first == 0, f"the fence of attempt {attempt} is its entry {first}")
            if isinstance(entry, Delta):
                text += "".join(choice.text for choice in entry.choices)
                _demand(position(entry_id)[0] == attempt, f"entry {entry_id} after the fence of {attempt}")
        got = transcript.choices[0].token_ids if transcript.choices else []
        _demand(got == expected[: len(got)], f"tokens {got} instead of {expected}")
        end = transcript.terminal
        complete = end is not None and end.error is None
        if complete:
            _demand(got == expected, f"only {len(got)} tokens before the end")
            assert end is not None and end.usage is not None
            _demand(end.usage.completion_tokens == len(expected), f"{end.usage} for {len(expected)} tokens")
        if got == expected:
            _demand(text == byte_level().decode(expected), f"text {text!r}")
        if end is not None and end.by.startswith("worker-"):
            by = int(end.by.partition("/")[2])
            _demand(by >= attempt, f"sealed by attempt {by} after the fence of {attempt}")

    @cached_property
    def expected(self) -> dict[str, list[int]]:
        """What an unbroken run generates, by job id."""
        return {
            job.id: [
                scripted_token(SequenceRequest("", job.prompt.token_ids or [], job.sampling), at, VOCABULARY)
                for at in range(self.tokens)
            ]
            for job in self.jobs
        }

    def _check_step(self, before: int, after: int, *, lossy: bool) -> None:
        if (before, after, lossy) in self._checked:
            return
        self._checked.add((before, after, lossy))
        old, new = self.server.keyspaces[before].logs, self.server.keyspaces[after].logs
        for job, log in old.items():
            if job in new:
                _demand(new[job][: len(log)] == log, f"{job}: what was in the log has changed")
            else:
                _demand(lossy, f"{job}: the log has vanished")

    def _check_belief(self, keyspace: Keyspace, worker: Local) -> None:
        for job, entry_id in worker.facts.written:
            log = keyspace.logs.get(job)
            there = log is None or any(entry_id == id_ for id_, _ in log)
            _demand(there, f"{worker.kind} believes that {entry_id} is in the log of {job}")
        _demand(not worker.facts.wrong, f"{worker.kind}: {', '.join(worker.facts.wrong)}")

    def check_end(self, state: State) -> None:
        """Raises `Broken` unless a state in which nothing can happen any more is as it should be."""
        keyspace = self.server.keyspaces[state.server]
        for number in state.workers:
            _demand(not self.locals[number].busy, f"{self.locals[number].kind} waits for ever")
        for job in self.jobs:
            if job.id in keyspace.logs:
                _demand(keyspace.sealed(job.id), f"{job.id} is never sealed")
            else:
                _demand(bool(self.disturbances & {"expire", "empty"}), f"{job.id} has no stream")
            for key in (keys.claim(job.id), keys.arq_job(job.id)):
                _demand(key not in keyspace.kinds, f"{key} is left behind")
        _demand(not keyspace.open, f"left in the index of open streams: {keyspace.open}")
        _demand(not keyspace.leased, f"left under a lease: {keyspace.leased}")
        _demand(not keyspace.waiting, f"left in a queue: {keyspace.waiting}")
        _demand(not keyspace.lasting, f"left without a TTL: {keyspace.lasting}")


@dataclass
class Explored:
    """What a search has seen."""

    states: int = 0
    moves: int = 0
    ends: int = 0


def explore(model: Model, disturbances: int) -> Explored:
    """Every order of everything with up to so many disturbances.

    Raises:
        Broken: the protocol forbids what can happen; says by which moves.
    """
    start = model.start
    origin: dict[State, tuple[State, str] | None] = {start: None}
    cost = {start: 0}
    ahead = deque([start])
    done: set[State] = set()
    calm: dict[State, list[State]] = {}
    """States by those that lead to them with nothing going wrong."""
    ends = []
    explored = Explored()

    def way(state: State) -> str:
        names = []
        while (step := origin[state]) is not None:
            state, name = step
            names.append(name)
        return "\n".join(f"{n:3}. {name}" for n, name in enumerate(reversed(names), start=1))

    later: deque[State] = deque()
    while ahead or later:
        if not ahead:
            ahead, later = later, ahead
        state = ahead.popleft()
        if state in done:
            continue
        done.add(state)
        quiet = True
        for move in model.moves(state, calm=cost[state] == disturbances):
            explored.moves += 1
            to = move.to
            try:
                model.check(state, move)
            except Broken as broken:
                raise Broken(f"{broken}\n{way(state)}\n  -> {move.name}") from None
            if not move.disturbs:
                quiet = quiet and move.name.startswith("a late request")
                calm.setdefault(to, []).append(state)
            total = cost[state] + move.disturbs
            if total <= disturbances and total < cost.get(to, disturbances + 1):
                cost[to] = total
                origin[to] = state, move.name
                (later if move.disturbs else ahead).append(to)
        if quiet:
            try:
                model.check_end(state)
            except Broken as broken:
                raise Broken(f"at the end: {broken}\n{way(state)}") from None
            ends.append(state)
    explored.states, explored.ends = len(done), len(ends)
    # From everywhere, if nothing more goes wrong, an end can be reached.
    reached = set(ends)
    while ends:
        for state in calm.get(ends.pop(), ()):
            if state not in reached:
                reached.add(state)
                ends.append(state)
    for state in done - reached:
        raise Broken(f"no end can be reached from here:\n{way(state)}")
    return explored


def _unclaimed(keyspace: Keyspace) -> bool:
    return all(of.get("attempt") == "0" for key, of in keyspace.hashes.items() if ":claim:" in key)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


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
