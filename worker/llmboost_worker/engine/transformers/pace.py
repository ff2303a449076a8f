"""How many tokens of prompts a step may take while others wait for their next token.

A step costs what its decoding rows cost, plus so much per prompt token. Both are measured as the engine runs:
how they compare depends on the machine, the model, the batch and the contexts, and from one to the next by a
factor of a hundred. A fixed number of tokens would stall running streams on a CPU, or waste a GPU.
"""

import time
from collections import deque
from collections.abc import Callable
from statistics import median

UNBOUNDED = 1 << 30

MIN_CHUNK = 8
"""Tokens that a prompt gets however dear they look: it must get on, and give new measurements."""

CROWD = 8
"""Prompts that wait count from here on: see `Pace.tokens`."""

KEPT = 9
"""Pure decode steps whose median counts, per size of the batch."""

STALE = 32
"""Mixed steps in a row after which a pure one is measured again. It costs nothing but prompts' patience."""

DECAY = 0.9
"""Weight of what was known about prompt tokens, against one new step."""

SPREAD = 1e-2
"""How different contexts must have been to tell what a token costs by itself from what its context adds."""


class Pace:
    """Running estimates of what steps cost."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = 0.0
        self._decode: dict[int, deque[float]] = {}
        """Seconds of pure decode steps, by the batch's size in powers of two."""
        self._mixed: dict[int, int] = {}
        """Mixed steps since the last of these."""
        self._prefill = _PrefillCost()

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def end(self, decoding: int, tokens: int, context: int) -> None:
        """It had so many decoding rows, and so many tokens of prompts, which see `context` tokens each on
        average."""
        seconds = self._clock() - self._began
        size = decoding.bit_length()
        if not tokens:
            if decoding:
                self._decode.setdefault(size, deque(maxlen=KEPT)).append(seconds)
                self._mixed[size] = 0
            return
        self._mixed[size] = self._mixed.get(size, 0) + 1
        if decoding and size not in self._decode:
            return
        own = seconds - (median(self._decode[size]) if decoding else 0.0)
        self._prefill.learn(tokens, context, max(0.0, own))

    def tokens(self, decoding: int, prompts: int, context: int) -> int:
        """Prompt tokens for the next step, so that it takes about twice as long as a pure decode step.

        Where prompts crowd, those behind them weigh as much as those who read: the step grows by as many
        decode steps as there are prompts per running sequence. Otherwise a full house would spend its time on
        small steps, in which few decode and most wait.

        Args:
            decoding: rows of the step that decode
            prompts: sequences that wait for their first token
            context: tokens before the next chunk
        """
        if not decoding:
            return UNBOUNDED
        size = decoding.bit_length()
        if size not in self._decode or self._mixed[size] >= STALE:
            return 0
        seconds = median(self._decode[size]) * max(1.0, prompts / max(decoding, CROWD))
        return max(MIN_CHUNK, self._prefill.affordable(seconds, context))


class _PrefillCost:
    """Seconds = tokens * (own + context * each), fitted to the latest steps by least squares."""

    def __init__(self) -> None:
        self._tt = self._tc = self._cc = self._ts = self._cs = 0.0
        """Decayed sums of products of tokens, tokens * context, and seconds."""

    def learn(self, tokens: int, context: int, seconds: float) -> None:
        pairs = tokens * context
        for name, product in (
            ("_tt", tokens * tokens),
            ("_tc", tokens * pairs),
            ("_cc", pairs * pairs),
            ("_ts", tokens * seconds),
            ("_cs", pairs * seconds),
        ):
            setattr(self, name, DECAY * getattr(self, name) + product)

    def affordable(self, seconds: float, context: int) -> int:
        """Tokens after `context` others; 0 if nothing is known."""
        if not self._tt:
            return 0
        own, each = self._fit()
        first = own + context * each
        if first <= 0:
            return UNBOUNDED
        # Half of a chunk's own tokens are context too, on average.
        tokens = seconds / first
        return int(min(UNBOUNDED, seconds / (first + each * tokens / 2)))

    def _fit(self) -> tuple[float, float]:
        determinant = self._tt * self._cc - self._tc * self._tc
        if determinant > SPREAD * self._tt * self._cc:
            each = (self._tt * self._cs - self._tc * self._ts) / determinant
            own = (self._cc * self._ts - self._tc * self._cs) / determinant
            if each > 0 and own > 0:
                return own, each
        return self._ts / self._tt, 0.0
