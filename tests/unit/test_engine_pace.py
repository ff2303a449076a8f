"""How much of a prompt a step takes: as much as keeps it near a pure decode step, on any machine."""

import pytest

from llmboost_worker.engine.transformers.pace import (
    CROWD,
    FIRST_CHUNK,
    MANY,
    MIN_CHUNK,
    SHARE,
    SHARE_OF_SHORT,
    SHORT,
    STALE,
    UNBOUNDED,
    Pace,
)


class Machine:
    """Steps cost what its formula says; time passes by nothing else."""

    def __init__(
        self, step: float = 0.03, row: float = 0.003, token: float = 0.003, pair: float = 1e-6
    ) -> None:
        self.now = 0.0
        self.step, self.row, self.token, self.pair = step, row, token, pair
        self.pace = Pace(clock=lambda: self.now)

    def decode_seconds(self, decoding: int) -> float:
        return self.step + decoding * self.row

    def run(self, decoding: int, tokens: int = 0, context: int = 0, delay: float = 0.0) -> float:
        """One step; returns its seconds. `context`: before the chunk."""
        self.pace.begin()
        seen = context + tokens // 2
        seconds = self.decode_seconds(decoding) + tokens * (self.token + seen * self.pair) + delay
        self.now += seconds
        self.pace.end(decoding, tokens, seen)
        return seconds

    def prefill(self, length: int, decoding: int, prompts: int = 1) -> list[float]:
        """Computes a prompt beside decoding rows, as the pace has it; returns the seconds of all steps."""
        done, steps = 0, []
        while done < length:
            tokens = min(length - done, self.pace.tokens(decoding, prompts, done))
            steps.append(self.run(decoding, tokens, done))
            done += tokens
        return steps


@pytest.mark.parametrize("decoding", [1, 5, 32])
@pytest.mark.parametrize(
    "machine",
    [
        {},
        {"token": 1e-4, "pair": 1e-7},
        {"token": 0.002, "pair": 2e-6},
        {"step": 0.5, "row": 0.01, "token": 0.02},
    ],
    ids=["small", "fast", "long contexts are dear", "large"],
)
def test_a_long_prompt_hardly_stretches_anyones_step(machine: dict[str, float], decoding: int) -> None:
    """All steps with 4,000 tokens stay near twice a pure decode step at most, and
    don't stay far below: the prompt is not held up for nothing."""
    simulated = Machine(**machine)
    simulated.run(0, tokens=200)
    for _ in range(10):
        simulated.run(decoding)
    first = simulated.prefill(1000, decoding)
    steps = simulated.prefill(4000, decoding)
    assert max(first) < 2.3 * simulated.decode_seconds(decoding)
    longest = max(steps) / simulated.decode_seconds(decoding)
    assert longest < 2.3
    assert sum(steps[:-1]) / (len(steps) - 1) > 1.4 * simulated.decode_seconds(decoding)


def test_a_prompt_found_in_part_is_not_taken_for_a_short_one() -> None:
    """Its first chunk stands behind 3,000 tokens. What contexts cost is known from other prompts."""
    machine = Machine(pair=2e-6)
    machine.run(0, tokens=200)
    for _ in range(10):
        machine.run(1)
    machine.prefill(4000, 1)
    machine.prefill(300, 1)
    machine.run(1)
    assert machine.run(1, machine.pace.tokens(1, 1, 3000), 3000) < 2.2 * machine.decode_seconds(1)


def test_with_nobody_decoding_prompts_have_the_whole_step() -> None:
    machine = Machine()
    assert machine.pace.tokens(0, 1, 0) == UNBOUNDED
    machine.run(0, tokens=2000)
    assert machine.pace.tokens(0, 30, 4000) == UNBOUNDED


def test_what_is_not_known_is_measured_first() -> None:
    """The first step of a batch of another size has no prompt in it."""
    machine = Machine()
    machine.run(0, tokens=100)
    assert machine.pace.tokens(8, 1, 0) == 0
    machine.run(8)
    assert 0 < machine.pace.tokens(8, 1, 0) <= FIRST_CHUNK
    assert machine.pace.tokens(16, 1, 0) == 0


def test_a_measurement_grows_old() -> None:
    """While each step has a prompt in it, a pure one is asked for now and then, and the pace follows."""
    machine = Machine()
    machine.run(0, tokens=100)
    machine.run(1)
    machine.prefill(300, 1)
    machine.run(1)
    before = machine.pace.tokens(1, 1, 0)
    machine.step *= 5
    for _ in range(3):
        for _ in range(STALE):
            machine.run(1, machine.pace.tokens(1, 1, 0))
        assert machine.pace.tokens(1, 1, 0) == 0
        machine.run(1)
    machine.prefill(300, 1)
    assert machine.pace.tokens(1, 1, 0) > 2 * before


def test_one_slow_step_changes_little() -> None:
    """A machine has other things to do, too."""
    machine = Machine()
    machine.run(0, tokens=200)
    for _ in range(9):
        machine.run(4)
    before = machine.pace.tokens(4, 1, 100)
    machine.run(4, delay=3.0)
    assert machine.pace.tokens(4, 1, 100) == before
    machine.run(4, before, 100, delay=3.0)
    assert machine.pace.tokens(4, 1, 100) > before / 2


def test_prompts_get_on_however_dear_they_are() -> None:
    machine = Machine(token=1.0)
    machine.run(0, tokens=20)
    machine.run(1)
    assert machine.pace.tokens(1, 1, 0) == MIN_CHUNK


def test_a_crowd_of_prompts_gets_more() -> None:
    """One share for every two; one that comes alone, or with another, is no crowd."""
    machine = Machine(pair=0.0)
    machine.run(0, tokens=2000)
    allowed = {}
    for prompts in (1, CROWD, 3 * CROWD, 15 * CROWD):
        machine.run(30)
        machine.prefill(1000, 30, prompts)
        machine.run(30)
        allowed[prompts] = machine.pace.tokens(30, prompts, 500)
    assert allowed[CROWD] == pytest.approx(allowed[1], abs=1)
    assert allowed[3 * CROWD] == pytest.approx(3 * allowed[1], rel=0.2)
    assert allowed[15 * CROWD] == pytest.approx(15 * allowed[1], rel=0.2)


def test_few_wait_for_many() -> None:
    """In proportion: one that decodes beside fifteen others that came with it lets them all in at once. A few
    are not many, however few decode, unless they are short."""

    def shares(decoding: int, prompts: int, longest: int = UNBOUNDED) -> float:
        """How many decode steps' worth of prompt tokens it takes."""
        machine = Machine(pair=0.0)
        machine.run(0, tokens=2000)
        machine.run(decoding)
        machine.prefill(1000, decoding, MANY)
        machine.run(decoding)
        tokens = machine.pace.tokens(decoding, prompts, 0, longest)
        return tokens * machine.token / machine.decode_seconds(decoding)

    assert shares(32, 16) == pytest.approx(shares(16, 16), rel=0.1)
    assert shares(8, 16) == pytest.approx(2 * shares(16, 16), rel=0.1)
    assert shares(1, 16) == pytest.approx(16 * shares(16, 16), rel=0.1)
    assert shares(1, MANY - 1) == pytest.approx(shares(16, MANY - 1), rel=0.1)
    assert shares(1, 3, longest=50) == pytest.approx(3 * shares(3, 3, longest=50), rel=0.1)


def test_short_prompts_are_soon_over() -> None:
    """One that takes a few steps may take more of each; how many is what counts, not how many are left."""
    machine = Machine(pair=0.0)
    machine.run(0, tokens=2000)
    machine.run(4)
    step = machine.decode_seconds(4)
    short = int(SHORT * step / machine.token) - 1
    took = [
        machine.run(4, machine.pace.tokens(4, 1, 0, longest)) / step
        for longest in [short] * 5 + [short + 2] * 5
    ]
    of_short, of_long = took[4], took[-1]
    assert of_long == pytest.approx(1 + SHARE, rel=0.05)
    assert of_short == pytest.approx(1 + SHARE_OF_SHORT, rel=0.05)
    assert of_short < 3


def test_what_was_measured_in_bad_times_does_not_open_the_gates() -> None:
    """While something else has the machine, decode steps take ten times as long. Afterwards a step with a
    prompt is faster than they were: prompt tokens seem to cost nothing. The first such step is a small one,
    and after it a pure one is measured."""
    machine = Machine()
    machine.run(0, tokens=20)
    for _ in range(10):
        machine.run(1, delay=10 * machine.decode_seconds(1))
    assert max(machine.prefill(2000, 1)) < 3 * machine.decode_seconds(1)
