"""What is asked: prompts and lengths, the same for the same seed."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from llmboost.cli.bench.options import Options
from llmboost.cli.bench.target import LOWEST_ID, Target
from llmboost.cli.bench.words import WORDS
from llmboost.cli.flags import UsageError

WARMUP_TOKENS = 16
"""An answer's, at most, where it does not count."""


@dataclass(frozen=True, slots=True)
class Question:
    """A line of an input: a prompt (text, or token ids) or messages."""

    prompt: Any
    max_tokens: int | None = None
    is_chat: bool = False


class _Body(msgspec.Struct):
    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    output_tokens: int | None = None


class _Line(_Body):
    body: _Body | None = None
    """Of a line of a batch."""


def read(source: Path) -> list[Question]:
    """The questions in a file of JSON lines.

    Raises:
        UsageError: it can't be read, or a line has neither prompt nor messages, or both kinds are there.
    """
    questions = []
    try:
        lines = source.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"--input {str(source)!r}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = msgspec.json.decode(line, type=_Line | str)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"--input {source}:{number}: {error}") from None
        body = _Body(prompt=found) if isinstance(found, str) else found.body or found
        if (body.prompt is None) == (body.messages is None):
            raise UsageError(f"--input {source}:{number}: a line needs a prompt, or messages, and not both")
        length = body.max_completion_tokens or body.max_tokens or body.output_tokens
        is_chat = body.messages is not None
        questions.append(Question(body.messages if is_chat else body.prompt, length, is_chat))
    if not questions:
        raise UsageError(f"--input {str(source)!r} holds no line")
    if len({question.is_chat for question in questions}) > 1:
        raise UsageError(f"--input {str(source)!r} has prompts and messages: they go to different endpoints")
    return questions


class Workload:
    """Request bodies by number. Those of one point of a sweep are not those of another, nor of its warm-up: a
    server that keeps prefixes would have them."""

    def __init__(self, options: Options, target: Target, questions: list[Question] | None) -> None:
        self._options = options
        self._target = target
        self._questions = questions
        self._asked = 0
        self._prefixes = [
            self._made_up(random.Random(f"{options.seed} prefix {number}"), options.shared_prefix_tokens)
            for number in range(options.num_prefixes if options.shared_prefix_tokens else 0)
        ]

    @property
    def path(self) -> str:
        """Where requests go."""
        return self._target.path

    def body(self, phase: str, number: int) -> dict[str, Any]:
        """The `number`-th request of a phase."""
        options = self._options
        draw = random.Random(f"{options.seed} {phase} {number}")
        max_tokens = draw.randint(options.output_tokens.least, options.output_tokens.most)
        if self._questions is None:
            prompt = self._prompt(draw)
        else:
            # Never the same again, as long as there are others: a server may have kept it.
            question = self._questions[self._asked % len(self._questions)]
            self._asked += 1
            prompt = question.prompt
            max_tokens = question.max_tokens or max_tokens
        temperature = draw.choice(options.temperatures)
        return self._target.body(prompt, max_tokens, temperature, options)

    def warmup(self, phase: str, number: int) -> dict[str, Any]:
        """The same, with a short answer."""
        body = self.body(f"{phase} warmup", number)
        length = self._target.length_field
        return body | {length: min(body[length], WARMUP_TOKENS)}

    def _prompt(self, draw: random.Random) -> str | list[int]:
        length = draw.randint(self._options.prompt_tokens.least, self._options.prompt_tokens.most)
        own = self._made_up(draw, length - round(self._target.tokens_around))
        prefix = draw.choice(self._prefixes) if self._prefixes else own[:0]
        parts = prefix + own
        if self._target.highest_id is not None:
            return parts
        return " ".join(parts)

    def _made_up(self, draw: random.Random, tokens: int) -> list[Any]:
        """Token ids, or words that come to about as many."""
        if self._target.highest_id is not None:
            return [draw.randint(LOWEST_ID, self._target.highest_id) for _ in range(tokens)]
        return draw.choices(WORDS, k=max(1, round(tokens / self._target.tokens_per_word)))
