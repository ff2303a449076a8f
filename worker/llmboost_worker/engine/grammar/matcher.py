"""Where one output stands in its grammar, and the thread that finds out while the model computes."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher

from llmboost_worker.engine.grammar.vocabulary import BLANKS, Vocabulary

MOST_BLANKS = 32
"""Whitespace in a row between two tokens of JSON, in bytes; a token may go beyond. A model that likes the
newline best would never come to the end."""


class Matcher:
    """The state of one output. It is a function of the output's ids alone, so a resumed one goes on as the
    unbroken one would have.

    `read` may run in another thread; whoever looks at the rest has waited for it.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, *, is_json: bool, start: int, holds_end: bool
    ) -> None:
        """
        Args:
            start: Tokens before the output: the prompt's.
            holds_end: The end isn't allowed as long as something else is.
        """
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._blanks = _Blanks() if is_json else None
        self._holds_end = holds_end
        self._read = start
        self._is_current = False
        """Whether `mask` is for what has been read."""
        self._pending: Future[None] | None = None
        self.mask = np.zeros(vocabulary.num_words, dtype=np.int32)
        """[words], packed: the tokens that may come next. None of them after an error."""
        self.must_end = False
        """The output is complete, and nothing but its end may follow."""
        self.error: str | None = None
        """Why it can't go on."""

    def pend(self, reading: "Future[None]") -> None:
        """`read` has been asked of another thread."""
        self._pending = reading

    def wait(self, tokens: Sequence[int]) -> None:
        """Until what may follow is known; finds out itself if nobody has been asked."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
        self.read(tokens)

    def read(self, tokens: Sequence[int]) -> None:
        """Takes in what is new in prompt and output, and works out what may follow."""
        if self.error is not None or (self._is_current and self._read == len(tokens)):
            return
        try:
            self._advance(list(tokens[self._read :]))
        except BaseException as error:  # a panic of the library's is no Exception; it ends this output alone
            self._fail(str(error))

    def _advance(self, new: list[int]) -> None:
        self._read += len(new)
        self._is_current = True
        if not self._matcher.consume_tokens(new):
            self._fail(self._matcher.get_error() or "its last token can't stand there")
            return
        self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if self._matcher.is_error():
            self._fail(self._matcher.get_error())
            return
        ends = self._vocabulary.ends
        self.must_end = not (self.mask & ~ends).any()
        if self._holds_end and not self.must_end:
            self.mask &= ~ends
        if self._blanks is not None:
            for token in new:
                self._blanks.read(self._vocabulary.tokens[token])
            if self._blanks.count >= MOST_BLANKS:
                self.mask &= ~self._vocabulary.blank_first

    def _fail(self, error: str) -> None:
        self.error = error.partition("\n")[0] or "it is too complex"
        self.mask[:] = 0
        self.must_end = False


class _Blanks:
    """Counts the whitespace at the end of what there is of a JSON text, outside of its strings."""

    def __init__(self) -> None:
        self.count = 0
        self._in_string = False
        self._escaped = False

    def read(self, text: bytes) -> None:
        for byte in text:
            if not self._in_string:
                self._in_string = byte == ord('"')
                self.count = self.count + 1 if byte in BLANKS else 0
            elif self._escaped:
                self._escaped = False
            elif byte == ord("\\"):
                self._escaped = True
            elif byte == ord('"'):
                self._in_string = False


class MatcherThread:
    """Finds out what may come next while the forward runs: that depends on the tokens so far alone.

    It does no torch operations: a second thread with those slows the first one down. The library lets go of
    the GIL while it works.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "llmboost-matcher")

    def start(self, batch: list[tuple[Matcher, list[int]]]) -> None:
        """Each with its prompt and output, which must not change until it has been waited for."""
        if batch:
            reading = self._pool.submit(_read_all, batch)
            for matcher, _ in batch:
                matcher.pend(reading)


def _read_all(batch: list[tuple[Matcher, list[int]]]) -> None:
    for matcher, tokens in batch:
        matcher.read(tokens)
