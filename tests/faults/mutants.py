"""Defects, made on purpose: each takes one guarantee away and leaves everything else as it works.

`with mutant(name):` puts one into this process. `python -m tests.faults.mutants COMMAND…` is `llmboost
COMMAND…` with the one that the environment names, and so is `pytest -p tests.faults.mutants`.
Nothing of it is in the product.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

VARIABLE = "TEST_MUTANT"


@dataclass(frozen=True)
class Mutant:
    """One defect."""

    takes_away: str
    """The rule of the protocol that no longer holds."""
    patches: Callable[[], list[Any]]
    """Imports what it changes: not every process has every package."""


MUTANTS: dict[str, Mutant] = {}


def _mutant(name: str, takes_away: str) -> Callable[[Callable[[], list[Any]]], None]:
    def add(patches: Callable[[], list[Any]]) -> None:
        MUTANTS[name] = Mutant(takes_away, patches)

    return add


@contextmanager
def mutant(name: str) -> Iterator[None]:
    """This process has the defect for as long as the block lasts."""
    patches = MUTANTS[name].patches()
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in reversed(patches):
            each.stop()


def _attribute(module: str, name: str, change: Callable[[Any], Any]) -> Any:
    """A patch of a function, of a method (`Class.method`) or of a script."""
    owner: Any = import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return patch.object(owner, last, change(getattr(owner, last)))


def _script(module: str, name: str, old: str, new: str) -> Any:
    """A patch of a script's source."""
    from llmboost.lua import Script

    def change(script: Script) -> Script:
        assert old in script.source, f"{name} no longer has {old!r}"
        return Script(script.source.replace(old, new))

    return _attribute(module, name, change)


# --- Writing ------------------------------------------------------------------------------------------


@_mutant("fence off", "an older attempt cannot append once a newer one has begun (DESIGN 3.1)")
def _fence_off() -> list[Any]:
    """Entries keep their numbers, but under whatever attempt is the newest in the stream. An id that was
    used is refused as before, and so is everything after the seal."""
    newest = """(function(key, id)
      local top = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
      if top then
        local attempt, n = string.match(top[1], '^(%d+)%-(%d+)')
        local mine = string.match(id, '^%d+')
        if tonumber(attempt) > tonumber(mine) and attempt ~= '9007199254740991' then
          return attempt .. '-' .. (tonumber(n) + 1)
        end
      end
      return id
    end)"""
    return [
        _script("llmboost.streams", name, entry_id, f"{newest}({key}, {entry_id})")
        for name, key, entry_id in (("_APPEND", "key", "ARGV[2 * i - 1]"), ("_BEGIN", "KEYS[1]", "ARGV[1]"))
    ]


@_mutant("NOMKSTREAM off", "a stream that is gone does not come back without its beginning (3.2)")
def _nomkstream_off() -> list[Any]:
    return [_script("llmboost.streams", name, "'NOMKSTREAM', ", "") for name in ("_APPEND", "_BEGIN")]


@_mutant("seal off", "nothing follows the terminal entry (3.5)")
def _seal_off() -> list[Any]:
    """The terminal entry is appended under the next ordinary id."""
    return [
        _script(
            "llmboost.streams",
            "_SEAL",
            "redis.call('XADD', KEYS[1], seal_id,",
            "local a, n = string.match(top[1], '^(%d+)%-(%d+)')\n"
            "  redis.call('XADD', KEYS[1], a .. '-' .. (tonumber(n) + 1),",
        )
    ]


@_mutant("fence after the read", "what an attempt has read is all that anyone older will have written (3.3)")
def _fence_after_read() -> list[Any]:
    from llmboost.entries import Started
    from llmboost.streams import StreamSealed, Writer, persist
    from llmboost.transcript import Transcript

    async def begin(self: Any, writer: Writer, worker: str) -> Transcript:
        transcript = Transcript()
        for entry_id, entry in await persist(lambda: self.read(writer.job_id)):
            transcript.apply(entry_id, entry)
        fence = (writer.job_id, writer.fence_id, Started(worker))
        [reply] = await persist(lambda: self.append([fence]))
        await self.check_reply(writer, writer.fence_id, reply)
        if transcript.terminal is not None:
            raise StreamSealed(writer.job_id)
        return transcript

    return [_attribute("llmboost.streams", "TokenStreams.begin", lambda _: begin)]


@_mutant("refusal believed", "a refused append is not yet an answer: it may be my own (3.8)")
def _refusal_believed() -> list[Any]:
    from llmboost.streams import StreamFenced, is_refusal

    def change(check: Any) -> Any:
        async def check_reply(self: Any, writer: Any, entry_id: str, reply: Any) -> None:
            if isinstance(reply, Exception) and is_refusal(reply):
                raise StreamFenced(writer.job_id)
            await check(self, writer, entry_id, reply)

        return check_reply

    return [_attribute("llmboost.streams", "TokenStreams.check_reply", change)]


@_mutant("refusal ignored", "a worker that was refused writes nothing more (3.8)")
def _refusal_ignored() -> list[Any]:
    from llmboost.streams import is_refusal

    def change(check: Any) -> Any:
        async def check_reply(self: Any, writer: Any, entry_id: str, reply: Any) -> None:
            if not (isinstance(reply, Exception) and is_refusal(reply)):
                await check(self, writer, entry_id, reply)

        return check_reply

    return [_attribute("llmboost.streams", "TokenStreams.check_reply", change)]


@_mutant("sent again under a new id", "sending an entry again cannot duplicate it (3.1)")
def _new_id() -> list[Any]:
    def change(take: Any) -> Any:
        def taken(self: Any) -> Any:
            if self.in_flight is not None:
                self.in_flight = self.writer.next_id(), self.in_flight[1]
            return take(self)

        return taken

    return [_attribute("llmboost_worker.publisher", "Outbox.take", change)]


@_mutant("seals without looking", "an attempt that was taken over cannot seal (3.6)")
def _seals_without_looking() -> list[Any]:
    def change(seal: Any) -> Any:
        async def sealed(self: Any, job_id: str, terminal: Any, writer: Any = None) -> Any:
            return await seal(self, job_id, terminal)

        return sealed

    return [_attribute("llmboost.streams", "TokenStreams.seal", change)]


# --- Reading ------------------------------------------------------------------------------------------


@_mutant("gap unseen", "a reader that meets a gap ends with an error (3.4)")
def _gap_unseen() -> list[Any]:
    from msgspec.structs import force_setattr

    from llmboost.entries import Delta

    def change(apply: Any) -> Any:
        def applied(self: Any, entry_id: str, entry: Any) -> None:
            if isinstance(entry, Delta):
                read = {index: len(choice.token_ids) for index, choice in self.choices.items()}
                for delta in entry.choices:
                    force_setattr(delta, "position", read.get(delta.index, 0))
                    read[delta.index] = delta.position + len(delta.token_ids)
            apply(self, entry_id, entry)

        return applied

    return [_attribute("llmboost.transcript", "Transcript.apply", change)]


# --- The queue ----------------------------------------------------------------------------------------


@_mutant("anybody finishes", "finish, renew and release compare owner and attempt first (4)")
def _anybody_finishes() -> list[Any]:
    compared = "if not mine(id, owner, attempt) then return 0 end"
    return [_script("llmboost.leases", "_FINISH", compared, "")]


@_mutant("attempts repeat", "every dispatch has a higher attempt (3.1)")
def _attempts_repeat() -> list[Any]:
    return [_script("llmboost.leases", "_CLAIM", "'attempt', 1)", "'attempt', 0) + 1")]


@_mutant("lapsed leases stay", "when a lease lapses, any live worker returns the job (4)")
def _lapsed_leases_stay() -> list[Any]:
    async def reclaim(*args: Any, **options: Any) -> list[str]:
        return []

    return [_attribute("llmboost.leases", "LeasedJobs.reclaim", lambda _: reclaim)]


@_mutant("hand-over counts as a death", "a hand-over costs no try (4)")
def _hand_over_counts() -> list[Any]:
    return [
        _script(
            "llmboost.leases",
            "_RELEASE",
            "then put_back(ARGV[i])",
            "then redis.call('HINCRBY', KEYS[1] .. ARGV[i], 'deaths', 1) put_back(ARGV[i])",
        )
    ]


@_mutant("gone for good", "what gives way to another job goes on later (4)")
def _gone_for_good() -> list[Any]:
    from llmboost_worker.generation import GaveWay

    def change(run: Any) -> Any:
        async def ran(*args: Any) -> None:
            with suppress(GaveWay):
                await run(*args)

        return ran

    return [_attribute("llmboost_worker.generation", "Generator.run", change)]


@_mutant("reaper off", "every accepted request ends in a terminal entry, whatever dies (3.7)")
def _reaper_off() -> list[Any]:
    async def reap(*args: Any, **options: Any) -> int:
        return 0

    return [_attribute("llmboost.queue", "JobQueue.reap", lambda _: reap)]


@_mutant("audience never lapses", "a stream that nobody reads is sealed (5)")
def _audience_never_lapses() -> list[Any]:
    async def audience(self: Any, job_ids: Any) -> list[float]:
        return [60.0] * len(job_ids)

    return [_attribute("llmboost.streams", "TokenStreams.audience", lambda _: audience)]


# --- What outlives its request --------------------------------------------------------------------------


@_mutant("nothing follows", "what follows from an end is done by the script that makes it the end")
def _nothing_follows() -> list[Any]:
    read = "for i = 1, #first, 2 do follow[first[i]] = first[i + 1] end"
    return [_script("llmboost.streams", "_SEAL", read, "")]


@_mutant("names taken twice", "under one name one request is accepted")
def _names_taken_twice() -> list[Any]:
    return [_script("llmboost.queue", "_SUBMIT", "if before then return before end", "")]


@_mutant("names of no answer", "a name does not stand for a request that nobody was there to have answered")
def _names_of_no_answer() -> list[Any]:
    async def unanswered(*args: Any) -> bool:
        return False

    return [_attribute("llmboost_api.submission", "_unanswered", lambda _: unanswered)]


@_mutant("anybody commits", "of the runners of a batch only the latest commits results")
def _anybody_commits() -> list[Any]:
    compared = "if held_by ~= ARGV[1] or held_attempt ~= ARGV[2] then return false end"
    return [_script("llmboost_api.batches.scripts", "COMMIT", compared, "")]


@_mutant("lines not marked", "a line whose result is committed is not run again")
def _lines_not_marked() -> list[Any]:
    marked = "redis.call('SETBIT', lines, ARGV[i] - 1, 1)"
    return [_script("llmboost_api.batches.scripts", "COMMIT", marked, "")]


@_mutant("commits count twice", "a commit that is sent again changes nothing")
def _commits_count_twice() -> list[Any]:
    there = "if redis.call('ZSCORE', parts, ARGV[first_part]) then return 1 end"
    return [_script("llmboost_api.batches.scripts", "COMMIT", there, "")]


@_mutant("gives way at once", "what gives way to another job goes on from all that it had")
def _gives_way_at_once() -> list[Any]:
    """What has been handed over and not yet appended is left out."""

    def change(give_way: Any) -> Any:
        def gave_way(self: Any) -> None:
            self.outbox.pending.clear()
            self.outbox.empty.set()
            give_way(self)

        return gave_way

    return [_attribute("llmboost_worker.generation", "Generation.give_way", change)]


@_mutant("each telling an event", "an end that is told again is the same event")
def _each_telling_an_event() -> list[Any]:
    from llmboost.jobs import new_id

    def change(_: Any) -> Any:
        return lambda prefix, *parts: new_id(prefix)

    return [_attribute("llmboost_api.webhooks.events", "derived_id", change)]


# --- The engine ---------------------------------------------------------------------------------------


@_mutant("running random state", "a token is drawn from (seed, position), not from a generator's state (3.9)")
def _running_state() -> list[Any]:
    """Random numbers go by how many tokens this process has drawn for the sequence."""

    def change(keys: Any) -> Any:
        drawn: Counter[int] = Counter()

        def running(states: Any, positions: Any) -> Any:
            counts = positions.new_tensor([drawn[state] for state in states.tolist()])
            drawn.update(states.tolist())
            return keys(states, counts)

        return running

    return [_attribute("llmboost_worker.engine.transformers.sampling.randomness", "keys", change)]


def pytest_configure() -> None:
    """As a plugin of pytest: the defect for the whole run, if the environment names one. That it is noticed
    is all one wants to know, not the smallest example."""
    from hypothesis import Phase, settings

    if name := os.environ.get(VARIABLE):
        settings.register_profile("mutant", phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutant")
        for each in MUTANTS[name].patches():
            each.start()


def main() -> None:
    """The command line of llmboost, with the defect that the environment names."""
    from llmboost.cli import main as llmboost

    with mutant(os.environ[VARIABLE]):
        llmboost()


if __name__ == "__main__":
    main()
