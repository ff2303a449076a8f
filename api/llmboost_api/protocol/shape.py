"""How an answer is written down: what a stream and a whole answer need from an endpoint's protocol."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from llmboost.entries import ChoiceDelta, TokenLogprob, Usage

encode_json = msgspec.json.Encoder().encode

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have; OpenAI's number for it."""


@dataclass(slots=True)
class Choice:
    """One choice of a whole answer."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, delta: ChoiceDelta) -> None:
        """What one step added."""
        self.texts.append(delta.text)
        self.logprobs += delta.logprobs or ()
        self.finish_reason = delta.finish_reason or self.finish_reason


class Shape(Protocol):
    """An endpoint's own form of an answer, as JSON."""

    def content(self, index: int, text: str, logprobs: Sequence[TokenLogprob], first: bool) -> bytes:
        """A chunk with new text of one choice."""

    def finish(self, index: int, reason: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """The chunk that ends one choice."""

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        """The answer that is not streamed."""


def usage_object(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finite(logprob: float | None) -> float | None:
    """The logprob, or the least that is sent; None if there is none."""
    return logprob if logprob is None or logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
