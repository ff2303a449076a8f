"""The visible text of one choice of one request."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llmboost.jobs import SamplingParams
from llmboost_worker.text.stops import StopStrings
from llmboost_worker.text.tokenizer import Tokenizer


class TextDelta(NamedTuple):
    """What one token made visible."""

    text: str
    stopped: bool
    """A stop string is complete: the choice ends with this token, and nothing after it is visible."""


class ChoiceText:
    """From a choice's tokens to what its reader sees: whole characters, no part of a stop string.

    A function of the ids alone: after `replay` of any first part of them, the pushes of the rest go on as if
    they had never been interrupted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        continues: Sequence[int] = (),
        end_ids: Iterable[int] = (),
    ) -> None:
        """A choice with no token yet.

        Args:
            tokenizer: The model's.
            sampling: For the stop strings, stop tokens and `min_tokens`.
            continues: See `Tokenizer.detokenizer`: the prompt's ids if the output continues its text, none
            if it
                is a text of its own.
            end_ids: The model's end-of-sequence tokens, which aren't text even if the tokenizer doesn't know
                them as special.
        """
        # What is held to a grammar has a space at its beginning only if that says so.
        self._detokenizer = tokenizer.detokenizer(continues, exact=sampling.grammar is not None)
        self._stops = StopStrings(sampling.stop, sampling.include_stop_str_in_output)
        self._min_tokens = sampling.min_tokens
        self._hidden: frozenset[int] = frozenset()
        if not sampling.include_stop_str_in_output:
            self._hidden = frozenset(sampling.stop_token_ids)
            if not sampling.ignore_eos or sampling.grammar is not None:
                self._hidden |= frozenset(end_ids)
        self.tokens = 0
        """Tokens read, up to and including the one that stopped it."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self._stops.stopped

    def push(self, token_id: int) -> TextDelta:
        """Reads one more token. A stop counts from the token on that makes `min_tokens` full."""
        if self.stopped:
            return TextDelta("", True)
        self.tokens += 1
        active = self.tokens >= self._min_tokens
        if active and token_id in self._hidden:
            return TextDelta("", False)
        return TextDelta(*self._stops.push(self._detokenizer.push(token_id), active))

    def replay(self, ids: Iterable[int]) -> str:
        """Reads the tokens that an earlier attempt emitted; returns the text that was visible for them.

        They may already hold a stop string: see `stopped`.
        """
        return "".join([self.push(token_id).text for token_id in ids])

    def finish(self) -> str:
        """The sequence has ended, by a stop string or otherwise: what was held back. Sets `stopped` if a stop
        string is complete only now."""
        if self.stopped:
            return ""
        text, _ = self._stops.push(self._detokenizer.flush(), self.tokens >= self._min_tokens)
        return text + self._stops.flush()
