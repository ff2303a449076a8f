"""Who takes part in a step."""

from typing import Any

import pytest

from llmboost_worker.engine.interface import EngineInfo
from llmboost_worker.engine.transformers.blocks import BlockManager
from llmboost_worker.engine.transformers.pace import UNBOUNDED, Pace
from llmboost_worker.engine.transformers.scheduler import SAT_OUT, Scheduler
from llmboost_worker.engine.transformers.sequence import Sequence
from tests.unit.engine_models import request

INFO = EngineInfo(512, 300, 4, (2,), "transformers", "float32", "cpu")


class Unhurried(Pace):
    """Lets prompts have what they like."""

    def tokens(self, decoding: int, prompts: int, context: int, longest: int = UNBOUNDED) -> int:
        return UNBOUNDED


class Simulation:
    """A scheduler whose sequences are computed by nobody: each step gives every complete one the token 7."""

    def __init__(
        self,
        max_num_seqs: int = 4,
        tokens: int = 100,
        room: int = 10_000,
        chunks: bool = True,
        pace: Pace | None = None,
    ) -> None:
        self.blocks = BlockManager(1 + room // 16)
        self.scheduler = Scheduler(self.blocks, pace or Unhurried(), max_num_seqs, tokens, chunks)
        self.arrivals = 0

    def add(
        self, id: str, prompt: int | list[int], priority: int = 0, max_tokens: int = 200, **sampling: Any
    ) -> Sequence:
        """A prompt of that length, unlike others, or these tokens."""
        self.arrivals += 1
        ids = [self.arrivals] * prompt if isinstance(prompt, int) else prompt
        asked = request(id, ids, max_tokens=max_tokens, priority=priority, **sampling)
        one = Sequence(asked, INFO, self.arrivals)
        self.scheduler.add(one)
        return one

    def step(self) -> dict[str, int]:
        batch = self.scheduler.schedule()
        for one in batch:
            complete = one.is_sampled
            one.num_cached += one.num_scheduled
            self.blocks.register(one.table, one.tokens, one.num_cached)
            if complete:
                one.append(7)
        return {one.id: one.num_scheduled for one in batch}


def test_decoding_comes_first_and_prompts_share_the_rest() -> None:
    simulation = Simulation(tokens=100)
    simulation.add("a", 30)
    assert simulation.step() == {"a": 30}
    simulation.add("b", 150)
    simulation.add("c", 60)
    assert simulation.step() == {"a": 1, "b": 99}
    assert simulation.step() == {"a": 1, "b": 51, "c": 48}
    assert simulation.step() == {"a": 1, "b": 1, "c": 12}
    assert simulation.step() == {"a": 1, "b": 1, "c": 1}


def test_no_more_sequences_run_than_allowed() -> None:
    simulation = Simulation(max_num_seqs=2)
    for id in "abc":
        simulation.add(id, 5)
    assert simulation.step() == {"a": 5, "b": 5}
    simulation.scheduler.remove("a")
    assert simulation.step() == {"b": 1, "c": 5}
    assert simulation.scheduler.num_waiting == 0


def test_smaller_priority_then_earlier_arrival_is_admitted_first() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add("batch", 5, priority=1)
    simulation.add("first", 5)
    simulation.add("second", 5)
    order = []
    for _ in range(3):
        (id,) = simulation.step()
        order.append(id)
        simulation.scheduler.remove(id)
    assert order == ["first", "second", "batch"]


def test_the_newest_of_the_lowest_class_gives_way() -> None:
    """When blocks run out. Of two batch sequences the one that came last loses its own, and continues when
    there is room, from the blocks that nobody has taken meanwhile."""
    simulation = Simulation(room=352)
    batch = simulation.add("batch", 100, priority=1, max_tokens=100)
    simulation.step()
    simulation.add("old", 100, max_tokens=100)
    new = simulation.add("new", 75, priority=1, max_tokens=100)
    while "new" not in simulation.scheduler.running:
        simulation.step()
    assert list(simulation.step()) == ["old", "batch", "new"]
    while "new" in simulation.scheduler.running:
        simulation.step()
    assert list(simulation.scheduler.running) == ["batch", "old"]
    assert simulation.scheduler.num_waiting == 1
    given, before = new.num_output, batch.num_output
    simulation.step()
    assert (new.num_output, batch.num_output) == (given, before + 1)
    simulation.scheduler.remove("old")
    # 75 tokens and those drawn since; all but the last block and the one that went to another.
    assert 0 < simulation.step()["new"] <= 2 * 16


def test_a_waiting_sequence_does_not_take_running_ones_memory() -> None:
    simulation = Simulation(room=256)
    simulation.add("a", 100, max_tokens=100)
    simulation.add("b", 130, max_tokens=100)
    assert simulation.step() == {"a": 100}
    assert simulation.step() == {"a": 1}
    simulation.scheduler.remove("a")
    assert simulation.step() == {"b": 100}


def test_what_the_cache_cannot_hold_alone_is_refused() -> None:
    """Prompt and output together: it would give way to itself for ever."""
    simulation = Simulation(room=128)
    with pytest.raises(ValueError, match=r"129 tokens.*more than the 128"):
        simulation.add("big", 100, max_tokens=29)
    simulation.add("whole", 100, max_tokens=28)
    assert simulation.step() == {"whole": 100}


def test_whole_prompts_wait_for_a_step_that_fits_them() -> None:
    simulation = Simulation(tokens=100, chunks=False)
    simulation.add("a", 60)
    simulation.add("b", 60)
    simulation.add("long", 300)
    assert simulation.step() == {"a": 60}
    assert simulation.step() == {"a": 1, "b": 60}
    assert simulation.step() == {"a": 1, "b": 1, "long": 300}


def test_remove_forgets_waiting_and_running_alike() -> None:
    simulation = Simulation(max_num_seqs=1)
    simulation.add("a", 5)
    simulation.add("b", 5)
    simulation.step()
    for id in ("b", "unknown", "a", "a"):
        simulation.scheduler.remove(id)
    assert simulation.step() == {}
    assert (len(simulation.scheduler.running), simulation.scheduler.num_waiting) == (0, 0)


# Classes


def test_a_lower_class_gives_up_its_slot_at_the_next_step() -> None:
    """The one that came last, and no more of them than are needed."""
    simulation = Simulation(max_num_seqs=3)
    for id in "abc":
        simulation.add(id, 5, priority=1)
    simulation.step()
    simulation.add("interactive", 5)
    assert simulation.step() == {"interactive": 5}
    assert list(simulation.scheduler.running) == ["a", "b", "interactive"]
    simulation.scheduler.remove("interactive")
    assert simulation.step() == {"a": 1, "b": 1, "c": 6}


def test_a_lower_class_gives_up_its_memory() -> None:
    simulation = Simulation(room=400)
    simulation.add("small", 100, priority=1)
    simulation.add("big", 200, priority=1)
    for _ in range(3):
        simulation.step()
    simulation.add("interactive", 130)
    simulation.step()
    assert list(simulation.scheduler.running) == ["small", "interactive"]


def test_the_same_class_gives_up_nothing() -> None:
    for priority in (0, 1):
        simulation = Simulation(max_num_seqs=1)
        simulation.add("a", 5, priority)
        simulation.step()
        simulation.add("b", 5, priority)
        assert simulation.step() == {"a": 1}


def test_a_lower_class_sits_out_while_a_prompt_of_a_higher_one_is_computed() -> None:
    """It keeps its slot. What decodes in the higher class has its token in every step."""
    simulation = Simulation(tokens=100)
    batch = simulation.add("batch", 5, priority=1)
    simulation.add("old", 5)
    simulation.step()
    simulation.step()
    simulation.add("new", 150)
    cached = batch.num_cached
    assert simulation.step() == {"old": 1, "new": 99}
    assert simulation.step() == {"old": 1, "new": 51}
    assert batch.num_cached == cached
    assert simulation.step() == {"old": 1, "batch": 1, "new": 1}


def test_a_lower_class_is_not_begun_beside_a_prompt_of_a_higher_one() -> None:
    simulation = Simulation()
    simulation.add("batch", 5, priority=1)
    simulation.add("interactive", 5)
    assert simulation.step() == {"interactive": 5}
    assert simulation.step() == {"interactive": 1, "batch": 5}


def test_prompts_without_end_do_not_stop_a_lower_class() -> None:
    """Neither one that is long, nor many of which each step begins one."""
    long = Simulation(tokens=20)
    long.add("batch", 5, priority=1)
    long.step()
    long.add("old", 5)
    long.step()
    long.step()
    long.add("long", 300)
    steps = [long.step() for _ in range(2 * (SAT_OUT + 1))]
    assert all("old" in step for step in steps)
    assert ["batch" in step for step in steps] == 2 * [*SAT_OUT * [False], True]
    many = Simulation()
    many.add("batch", 5, priority=1)
    for number in range(10):
        many.add(str(number), 5)
        if "batch" in many.step():
            break
        many.scheduler.remove(str(number))
    else:
        raise AssertionError("it was never begun")


# The prefix cache

SHARED = [9] * 40
"""Two full blocks, and a part of a third."""


def test_a_second_prompt_computes_only_what_the_first_has_not() -> None:
    simulation = Simulation()
    first = simulation.add("first", 50)
    simulation.step()
    simulation.scheduler.remove("first")
    again = simulation.add("again", list(first.tokens[:50]))
    assert simulation.step() == {"again": 2}
    assert (first.num_found, again.num_found) == (0, 48)


def test_what_begins_alike_is_computed_once() -> None:
    """The others come in as soon as the beginning is there, and meanwhile those that begin otherwise."""
    simulation = Simulation(max_num_seqs=8)
    for number in range(3):
        simulation.add(f"shared-{number}", [*SHARED, number])
    simulation.add("other", 20)
    assert simulation.step() == {"shared-0": 41, "other": 20}
    assert simulation.step() == {"shared-0": 1, "other": 1, "shared-1": 9, "shared-2": 9}


def test_who_waits_for_a_beginning_has_a_slot_reserved() -> None:
    simulation = Simulation(max_num_seqs=2, tokens=30)
    simulation.add("first", SHARED)
    simulation.add("second", SHARED)
    simulation.add("other", 5)
    assert simulation.step() == {"first": 30}
    assert simulation.step() == {"first": 10}
    assert simulation.step() == {"first": 1, "second": 8}
    assert "other" not in simulation.scheduler.running


def test_when_the_one_that_computes_a_beginning_leaves_the_next_in_line_does() -> None:
    """From the block that was complete."""
    simulation = Simulation(tokens=20)
    for id in ("first", "second", "third"):
        simulation.add(id, SHARED)
    simulation.scheduler.schedule()
    simulation.scheduler.remove("first")  # before it has computed anything
    assert simulation.step() == {"second": 20}
    simulation.scheduler.remove("second")
    assert simulation.step() == {"third": 20}
    assert simulation.step() == {"third": 4}


def test_a_higher_class_does_not_wait_for_what_a_lower_one_computes() -> None:
    """That sits out while the higher one has a prompt: they would wait for each other."""
    simulation = Simulation(tokens=20)
    simulation.add("batch", SHARED, priority=1)
    simulation.step()
    simulation.add("interactive", SHARED)
    assert simulation.step() == {"interactive": 20}


def test_logprobs_of_a_prompt_need_all_of_it() -> None:
    simulation = Simulation()
    simulation.add("first", SHARED)
    simulation.step()
    asked = simulation.add("asked", SHARED, prompt_logprobs=0)
    assert simulation.step() == {"first": 1, "asked": 40}
    assert asked.num_found == 0


def test_whatever_comes_and_goes_everyone_gets_on() -> None:
    """Prompts that share beginnings, in both classes, in a cache that holds a few of them: with somebody to
    serve, a step serves somebody, and all come to their end."""
    simulation = Simulation(max_num_seqs=6, tokens=30, room=320)
    sequences = [
        simulation.add(f"{n}", [n % 3] * (20 + 7 * n), priority=n % 2, max_tokens=60) for n in range(12)
    ]
    for step in range(3000):
        batch = simulation.step()
        assert batch or not (simulation.scheduler.running or simulation.scheduler.num_waiting)
        for one in sequences:
            if one.id in batch and (one.finish_reason() or step == 10 * int(one.id)):
                simulation.scheduler.remove(one.id)
    assert (len(simulation.scheduler.running), simulation.scheduler.num_waiting) == (0, 0)
    assert simulation.blocks.num_used == 0


# Pace


class Bounded(Pace):
    """Allows so many tokens, and writes down for what."""

    def __init__(self, *allowed: int) -> None:
        super().__init__()
        self.allowed = list(allowed)
        self.asked: list[tuple[int, int, int, int]] = []

    def tokens(self, decoding: int, prompts: int, context: int, longest: int = UNBOUNDED) -> int:
        self.asked.append((decoding, prompts, context, longest))
        return self.allowed.pop(0) if self.allowed else UNBOUNDED


def test_prompts_get_what_the_pace_allows_beside_those_that_decode() -> None:
    pace = Bounded(UNBOUNDED, 7, 0, 9)
    simulation = Simulation(pace=pace)
    simulation.add("a", 5)
    assert simulation.step() == {"a": 5}
    simulation.add("b", 30)
    simulation.add("c", 30)
    assert simulation.step() == {"a": 1, "b": 7}
    assert simulation.step() == {"a": 1}
    assert simulation.step() == {"a": 1, "b": 9}
    assert simulation.step() == {"a": 1, "b": 14, "c": 30}
    assert pace.asked == [(0, 1, 0, 5), (1, 2, 0, 30), (1, 2, 7, 30), (1, 2, 7, 30), (1, 2, 16, 30)]


def test_those_that_find_no_slot_do_not_count_as_a_crowd() -> None:
    pace = Bounded(UNBOUNDED, 1)
    simulation = Simulation(max_num_seqs=3, pace=pace)
    simulation.add("a", 5)
    simulation.step()
    for number in range(20):
        simulation.add(f"{number}", 10)
    simulation.step()
    assert pace.asked[-1] == (1, 2, 0, 10)
