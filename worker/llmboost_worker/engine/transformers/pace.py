"""How many tokens of prompts a step may take while others wait for their next token.

A step costs what its decoding rows cost, plus so much per prompt token. Both are measured as the engine runs:
how they compare depends on the machine, the model, the batch and the contexts, and from one to the next by a
factor of a hundred. A fixed number of tokens would stall running streams on a CPU, or waste a GPU.
"""

import time
from collections.abc import Callable
from statistics import median

UNBOUNDED = 1 << 30

SHARE = 0.65
"""What a prompt's part of a step may cost, in pure decode steps. Nobody is to wait for a token more than
three times as long as usual; what is left is for the machine's moods."""

SHARE_OF_SHORT = 1.75
SHORT = 16
"""The same, where no prompt takes so many decode steps alone: a few large chunks cost less than many small
ones, and are soon over."""

MIN_CHUNK = 4
"""Tokens that prompts get however dear they look: they must get on, and give new measurements."""

FIRST_CHUNK = 16
GROWTH = 2
"""The first chunk beside a batch, at most, and how much larger each may be than the one before."""

CROWD = 2
"""So many prompts that wait get one share."""

MANY = 8
"""So many are let in without trying smaller chunks first. Where there are so many, or short ones, and they
are more than the rows that decode, these wait for them so much the longer."""

KEPT = 9
KEPT_STALE = 3
"""Pure decode steps whose median counts, per size of the batch; the fewer if they are far between."""

STALE = 32
"""Mixed steps in a row after which a pure one is measured again. It costs nothing but prompts' patience."""

FASTER = 0.8
"""Of a pure decode step's time: a mixed one that takes less proves that to be out of date."""

DECAY = 0.8
"""Weight of what was known of prompt tokens, against one new step."""

NEAR = 256
"""Tokens of context that make no difference."""

SURPRISE = 3
"""Times the expected that a measurement counts at most: the machine has other things to do now and then."""


class Pace:
    """Running estimates of what steps cost."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = 0.0
        self._batches: dict[int, _Batch] = {}
        """By decoding rows, in powers of two."""
        self._prefill = _PrefillCost()

    def begin(self) -> None:
        """A step begins."""
        self._began = self._clock()

    def end(self, decoding: int, tokens: int, context: int) -> None:
        """It had so many decoding rows, and so many tokens of prompts, which see `context` tokens each on
        average."""
        seconds = self._clock() - self._began
        batch = self._batches.setdefault(decoding.bit_length(), _Batch())
        if not tokens:
            batch.took(seconds)
            return
        own = batch.took_more(seconds, tokens) if decoding else seconds
        if own is not None:
            self._prefill.learn(tokens, context, own)

    def tokens(self, decoding: int, prompts: int, context: int, longest: int = UNBOUNDED) -> int:
        """Prompt tokens for the next step, so that it takes less than twice as long as a pure decode step.

        The more prompts wait, the more they get. Otherwise a full house would spend its time on small steps,
        in which few decode and most wait: simulated with 32 clients that send 256 tokens and draw 64, 51
        tokens a second instead of 59 (60 without any bound), and four times as long to the first one. Steps
        grow for everyone then, so that the longest gap stays near the usual one. Of clients that all come at
        once the first one's tokens would cost nearly a whole batch's while the others are let in one by one:
        with 16 of them, 228 tokens a second where one large step makes 267.

        Args:
            decoding: rows of the step that decode
            prompts: sequences that wait for their first token
            context: tokens before the next chunk
            longest: tokens of the longest prompt, all of it
        """
        if not decoding:
            return UNBOUNDED
        batch = self._batches.setdefault(decoding.bit_length(), _Batch())
        if batch.seconds is None or batch.num_mixed >= STALE:
            return 0
        is_short = longest <= self._prefill.affordable(SHORT * batch.seconds, context)
        share = SHARE_OF_SHORT if is_short else SHARE
        seconds = share * batch.seconds * max(1.0, prompts / CROWD)
        if is_short or prompts >= MANY:
            seconds *= max(1.0, prompts / decoding)
        affordable = max(MIN_CHUNK, self._prefill.affordable(seconds, context))
        return affordable if prompts >= MANY else batch.allow(affordable)


class _Batch:
    """What is known of steps with about so many decoding rows."""

    def __init__(self) -> None:
        self.seconds: float | None = None
        """Of a pure decode step."""
        self.num_mixed = 0
        """Mixed steps since the last one."""
        self._latest: list[float] = []
        self._tried = FIRST_CHUNK // GROWTH
        self._allowed = 0

    def took(self, seconds: float) -> None:
        """A pure decode step."""
        kept = KEPT_STALE if self.num_mixed >= STALE else KEPT
        self._latest = [*self._latest, seconds][-kept:]
        self.seconds = median(self._latest)
        self.num_mixed = 0

    def took_more(self, seconds: float, tokens: int) -> float | None:
        """A step with prompt tokens; returns what these took, as far as one can tell."""
        self._tried = max(tokens, min(self._tried, self._allowed))
        self.num_mixed += 1
        if self.seconds is None:
            return None
        if seconds < FASTER * self.seconds:
            # The machine has more time than it had: what was measured doesn't hold.
            self._latest = []
            self.num_mixed = STALE
            return None
        return max(0.0, seconds - self.seconds)

    def allow(self, tokens: int) -> int:
        """As many, but not far beyond what has been tried: an estimate may be wrong by any factor, where
        the machine is shared."""
        self._allowed = min(tokens, GROWTH * self._tried)
        return self._allowed


class _PrefillCost:
    """Seconds per prompt token, by how many it sees, in powers of two: attention costs more the longer the
    context is, and how much more is a matter of machine and model."""

    def __init__(self) -> None:
        self._spent: dict[int, tuple[float, float]] = {}
        """Decayed sums of seconds and tokens, by the context."""

    def learn(self, tokens: int, context: int, seconds: float) -> None:
        size = (context // NEAR).bit_length()
        spent, before = self._spent.get(size, (0.0, 0.0))
        if spent:
            seconds = min(seconds, SURPRISE * spent / before * tokens)
        self._spent[size] = DECAY * spent + seconds, DECAY * before + tokens

    def affordable(self, seconds: float, context: int) -> int:
        """Tokens after `context` others; 0 if nothing is known."""
        if not self._spent:
            return 0
        size = (context // NEAR).bit_length()
        # What was never measured costs no more than the next longer context, or than twice the next shorter
        # one for each doubling between them. Once tried, it is known.
        known = min((other for other in self._spent if other >= size), default=max(self._spent))
        spent, tokens = self._spent[known]
        each = spent / tokens * 2 ** max(0, size - known)
        return int(min(UNBOUNDED, seconds / each)) if each else UNBOUNDED
