"""What the protocol promises, as checks of states and of moves (DESIGN 3 and 4)."""

from functools import cached_property
from itertools import pairwise

from llmboost import keys
from llmboost.entries import Delta, Queued, ReadEntry, Started
from llmboost.jobs import GenerationJob
from llmboost.streams import QUEUED_ID, position
from llmboost.transcript import StreamGap, Transcript
from llmboost_worker.engine.interface import SequenceRequest
from tests.engines import scripted_token
from tests.integration.protocol.actors import VOCABULARY
from tests.integration.protocol.model import Model, Move, State
from tests.integration.protocol.places import Local
from tests.integration.protocol.server import Keyspace
from tests.unit.text_tokenizers import byte_level


class Broken(AssertionError):
    """A state, or a way to it, that the protocol forbids."""


def demand(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


class Rules:
    """Of one model; each state of the server, and each belief about it, is checked once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._checked: set[object] = set()

    def check(self, before: State, move: Move) -> None:
        """Raises `Broken` if a move, or the state that it leads to, is against the protocol."""
        state = move.to
        if state.server not in self._checked:
            self._check_keyspace(self.model.server.keyspaces[state.server])
            self._checked.add(state.server)
        if before.server != state.server:
            self._check_step(before.server, state.server, lossy=move.disturbs)
        for number in state.workers:
            if (state.server, number) not in self._checked:
                self._check_belief(self.model.server.keyspaces[state.server], self.model.locals[number])
                self._checked.add((state.server, number))

    def _check_keyspace(self, keyspace: Keyspace) -> None:
        leased, open_ = keyspace.leased, keyspace.open
        queues = [key for key in keyspace.sets if ":queue:" in key]
        for job in self.model.jobs:
            places = [key for key in queues if job.id in dict(keyspace.sets[key])]
            demand(len(places) + (job.id in leased) <= 1, f"{job.id} is in {places} and leased")
            log = keyspace.logs.get(job.id)
            if log is None:
                continue
            self._check_log(job, log)
            if keyspace.sealed(job.id):
                demand(job.id not in open_, f"{job.id} is sealed but still in the index of open streams")
                continue
            demand(job.id in open_, f"{job.id} is open but the reaper's index doesn't have it")
            demand(keys.arq_job(job.id) in keyspace.kinds, f"{job.id} was deleted, but its stream is open")
            newest = position(log[-1][0])[0]
            attempt = int(keyspace.claim(job.id).get("attempt", -1))
            demand(attempt >= newest, f"{job.id}: the next attempt is {attempt + 1}, after {newest}")

    def _check_log(self, job: GenerationJob, log: list[ReadEntry]) -> None:
        ids = [position(entry_id) for entry_id, _ in log]
        demand(all(a < b for a, b in pairwise(ids)), f"ids don't rise: {ids}")
        demand(log[0][0] == QUEUED_ID and isinstance(log[0][1], Queued), f"{job.id} has no beginning")
        expected = self.expected[job.id]
        transcript, text = Transcript(), ""
        attempt = 0
        for entry_id, entry in log:
            demand(transcript.terminal is None, f"entry {entry_id} follows the terminal one")
            try:
                transcript.apply(entry_id, entry)
            except StreamGap as gap:
                raise Broken(str(gap)) from gap
            if isinstance(entry, Started):
                attempt, first = position(entry_id)
                demand(first == 0, f"the fence of attempt {attempt} is its entry {first}")
            if isinstance(entry, Delta):
                text += "".join(choice.text for choice in entry.choices)
                demand(position(entry_id)[0] == attempt, f"entry {entry_id} after the fence of {attempt}")
        got = transcript.choices[0].token_ids if transcript.choices else []
        demand(got == expected[: len(got)], f"tokens {got} instead of {expected}")
        end = transcript.terminal
        complete = end is not None and end.error is None
        if complete:
            demand(got == expected, f"only {len(got)} tokens before the end")
            assert end is not None
            assert end.usage is not None
            demand(end.usage.completion_tokens == len(expected), f"{end.usage} for {len(expected)} tokens")
        if got == expected:
            demand(text == byte_level().decode(expected), f"text {text!r}")
        if end is not None and end.by.startswith("worker-"):
            by = int(end.by.partition("/")[2])
            demand(by >= attempt, f"sealed by attempt {by} after the fence of {attempt}")

    @cached_property
    def expected(self) -> dict[str, list[int]]:
        """What an unbroken run generates, by job id."""
        return {
            job.id: [
                scripted_token(SequenceRequest("", job.prompt.token_ids or [], job.sampling), at, VOCABULARY)
                for at in range(self.model.tokens)
            ]
            for job in self.model.jobs
        }

    def _check_step(self, before: int, after: int, *, lossy: bool) -> None:
        if (before, after, lossy) in self._checked:
            return
        self._checked.add((before, after, lossy))
        old, new = self.model.server.keyspaces[before].logs, self.model.server.keyspaces[after].logs
        for job, log in old.items():
            if job in new:
                demand(new[job][: len(log)] == log, f"{job}: what was in the log has changed")
            else:
                demand(lossy, f"{job}: the log has vanished")

    def _check_belief(self, keyspace: Keyspace, worker: Local) -> None:
        for job, entry_id in worker.facts.written:
            log = keyspace.logs.get(job)
            there = log is None or any(entry_id == id_ for id_, _ in log)
            demand(there, f"{worker.kind} believes that {entry_id} is in the log of {job}")
        demand(not worker.facts.wrong, f"{worker.kind}: {', '.join(worker.facts.wrong)}")

    def check_end(self, state: State) -> None:
        """Raises `Broken` unless a state in which nothing can happen any more is as it should be."""
        keyspace = self.model.server.keyspaces[state.server]
        for number in state.workers:
            demand(not self.model.locals[number].busy, f"{self.model.locals[number].kind} waits for ever")
        for job in self.model.jobs:
            if job.id in keyspace.logs:
                demand(keyspace.sealed(job.id), f"{job.id} is never sealed")
            else:
                demand(bool(self.model.disturbances & {"expire", "empty"}), f"{job.id} has no stream")
            for key in (keys.claim(job.id), keys.arq_job(job.id)):
                demand(key not in keyspace.kinds, f"{key} is left behind")
        demand(not keyspace.open, f"left in the index of open streams: {keyspace.open}")
        demand(not keyspace.leased, f"left under a lease: {keyspace.leased}")
        demand(not keyspace.waiting, f"left in a queue: {keyspace.waiting}")
        demand(not keyspace.lasting, f"left without a TTL: {keyspace.lasting}")
