"""What a worker and an engine agree on.

An engine owns its compute thread (or process) and every tensor in it, loading included: the second
thread to run multi-threaded torch operations is 1.4 to 2.9 times slower than the first. The event loop
that calls `add` and `cancel` never waits for compute, and compute never waits for whoever reads its output.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from llmboost.jobs import Grammar, SamplingParams

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the loaded model can do."""

    max_model_len: int
    """Prompt and output together, in tokens."""
    vocab_size: int
    """Ids are in [0, vocab_size)."""
    max_num_seqs: int
    """Sequences that run in one step."""
    eos_token_ids: tuple[int, ...]
    engine: str
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One choice of one request: continue `prompt_ids + output_ids`."""

    id: str
    """Unique in this engine while the sequence lives."""
    prompt_ids: list[int]
    """At least one id, all in [0, vocab_size)."""
    sampling: SamplingParams
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)
    """Already emitted by an earlier attempt: count as output for limits, penalties and random numbers."""
    max_tokens: int = 1
    """Output tokens at most, `output_ids` included; with the prompt no more than `max_model_len`. 0 with
    `sampling.prompt_logprobs`: the prompt is computed for these alone."""
    priority: int = 0
    """0 is interactive, 1 batch: smaller is admitted first."""
    grammar: Any = None
    """What `Engine.compile` made of `sampling.grammar`; `output_ids` follow it as far as they go."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model's distribution before temperature and filters
    (as OpenAI and vLLM report them)."""

    logprob: float
    """Of the drawn token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first, as (id, logprob); at most `sampling.top_logprobs`."""


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step gave one sequence."""

    id: str
    token_ids: list[int]
    """New ids in order; the end-of-sequence token included when it was drawn. May be empty with an error."""
    logprobs: list[TokenLogprobs] | None = None
    """One per new id, if asked for."""
    finish_reason: FinishReason | None = None
    """Set once, in the sequence's last output."""
    error: str | None = None
    """With finish_reason "error": what happened, for an operator and the client."""
    is_refused: bool = False
    """With an error: it is the request that can't be run, and not the engine that failed."""
    cached_tokens: int = 0
    """In the sequence's first output: how many of the prompt's tokens were found in the prefix cache."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """In the sequence's first output, if asked for: one per prompt token, None for the first."""


StepOutput = list[SequenceOutput]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot; each number is read without stopping the engine."""

    running: int
    """Sequences that hold a slot."""
    waiting: int
    steps: int
    prompt_tokens: int
    """Computed."""
    output_tokens: int
    cached_tokens: int = 0
    """Of prompts, found in the prefix cache instead."""
    blocks_used: int = 0
    """Of the key/value cache, in use by sequences. What is kept for others to find isn't counted."""
    blocks_total: int = 0


class EngineError(RuntimeError):
    """The engine can't be started or has ended; the message says why and what to do."""


class GrammarError(ValueError):
    """No output can be held to this grammar. The message follows the name of the field that has it."""


class Engine(ABC):
    """Continuous batching behind a few verbs; every method may be called from the event loop."""

    @abstractmethod
    def start(
        self, on_step: Callable[[StepOutput], None], on_failure: Callable[[BaseException], None]
    ) -> EngineInfo:
        """Loads the model in the engine's own thread and returns when it can generate (blocks: minutes for
        a large model). `on_step` is called from that thread after each step; it must not block,
        nor raise: what it didn't take is lost, so the engine ends.
        `on_failure` is called once if the engine ends by itself.

        Raises:
            EngineError: the model can't be loaded or can't be served.
        """

    @abstractmethod
    def add(self, requests: list[SequenceRequest]) -> None:
        """Queues sequences; they join the batch at the next step that has a slot."""

    def compile(self, grammar: Grammar) -> "Future[Any]":
        """Makes of a grammar what a `SequenceRequest` takes, in a thread of the engine's, and keeps it for
        the next one with the same. The future fails with GrammarError. It is shared: never cancel it."""
        refused: Future[Any] = Future()
        refused.set_exception(GrammarError("can't be met: this engine holds no output to a grammar."))
        return refused

    @abstractmethod
    def cancel(self, ids: list[str]) -> None:
        """Frees the sequences' slots at the next step. Unknown ids are ignored. No further output for them
        once the current step is over, and no final one."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """Counters now."""

    @abstractmethod
    def close(self) -> None:
        """Ends the compute thread after its current step and frees the model. Idempotent."""
