"""Small random models for the engine's tests, saved as folders, and what drives an engine in a test."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import (
    Engine,
    EngineInfo,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine
from tests.commands import wait_until
from tests.unit.engine_configs import COMMON, CONFIGS, EOS, PAD, VOCAB

__all__ = ["COMMON", "CONFIGS", "EOS", "PAD", "VOCAB"]

torch.set_num_threads(1)  # the models are too small to gain from more, and the machine may be busy

TIMEOUT = 60.0

POISON = VOCAB - 1
"""A token that no `prompt` has."""

PER_TOKEN = 3 * 2 * (16 + 16) * 4
"""Bytes of keys and values of `CONFIGS["llama"]` and its like: layers, heads, dimensions, float32."""

LONG = {"max_tokens": 400, "ignore_eos": True}
"""Until it is taken out."""


def save_model(
    config: PreTrainedConfig, folder: Path, seed: int = 0, spread: float = 0.0, poison: int | None = None
) -> Path:
    """A random model of that configuration; the same each time.

    Biases, norms and sinks are born as zeros and ones; `spread` is the deviation of noise added to them.
    `poison`: a token whose embedding is NaN.
    """
    torch.manual_seed(seed)
    text = type(config) in AutoModelForCausalLM._model_mapping
    model = (AutoModelForCausalLM if text else AutoModelForMultimodalLM).from_config(config)
    with torch.no_grad():
        for vector in model.parameters():
            if vector.ndim < 2 and spread:
                vector += spread * torch.randn_like(vector)
        if poison is not None:
            model.get_input_embeddings().weight[poison] = torch.nan
    model.save_pretrained(folder)
    return folder


def prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids, without special ones and without the vocabulary's last."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, VOCAB - 1, (length,), generator=generator).tolist()


def request(
    id: str, prompt_ids: list[int], output_ids: list[int] | None = None, max_tokens: int = 16, **sampling: Any
) -> SequenceRequest:
    """Greedy unless told otherwise."""
    sampling.setdefault("temperature", 0.0)
    choice = sampling.pop("choice", 0)
    priority = sampling.pop("priority", 0)
    return SequenceRequest(
        id=id,
        prompt_ids=prompt_ids,
        sampling=SamplingParams(**sampling),
        choice=choice,
        output_ids=output_ids or [],
        max_tokens=max_tokens,
        priority=priority,
    )


@dataclass
class Collected:
    """Everything one sequence has been given."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    is_refused: bool = False
    prompt_logprobs: list[Any] | None = None
    prompt_logprobs_came: int = 0
    cached_tokens: int = field(default=0, compare=False)


class Driver:
    """An engine, and all of its output by sequence."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.changed = threading.Condition()
        self.sequences: dict[str, Collected] = {}
        self.failures: list[BaseException] = []
        self.info: EngineInfo = engine.start(self._on_step, self._on_failure)

    def _on_step(self, outputs: StepOutput) -> None:
        with self.changed:
            for output in outputs:
                self._take(output)
            self.changed.notify_all()

    def _take(self, output: SequenceOutput) -> None:
        sequence = self.sequences.setdefault(output.id, Collected())
        assert sequence.finish_reason is None, f"output for {output.id} after its last"
        sequence.token_ids += output.token_ids
        sequence.logprobs += output.logprobs or []
        sequence.finish_reason = output.finish_reason
        sequence.error = output.error
        sequence.is_refused = output.is_refused
        if output.prompt_logprobs is not None:
            sequence.prompt_logprobs = output.prompt_logprobs
            sequence.prompt_logprobs_came += 1
        sequence.cached_tokens += output.cached_tokens

    def _on_failure(self, error: BaseException) -> None:
        with self.changed:
            self.failures.append(error)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, TIMEOUT), "timed out"

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """For what no output announces."""
        wait_until(condition, within=TIMEOUT, every=0.001)

    def tokens(self, id: str) -> list[int]:
        return self.sequences[id].token_ids if id in self.sequences else []

    def finished(self, id: str) -> bool:
        return id in self.sequences and self.sequences[id].finish_reason is not None

    def run(self, *requests: SequenceRequest) -> list[Collected]:
        """Sends them at once, waits for all."""
        with self.changed:
            for one in requests:
                self.sequences.pop(one.id, None)
        self.engine.add(list(requests))
        self.wait(lambda: all(self.finished(one.id) for one in requests) or self.failures)
        assert not self.failures, self.failures
        return [self.sequences[one.id] for one in requests]

    def run_one(self, one: SequenceRequest) -> Collected:
        return self.run(one)[0]


@contextmanager
def driving(
    folder: Path, tokens: Callable[[], list[bytes]] | None = None, **options: Any
) -> Iterator[Driver]:
    """An engine on that folder, closed at the end."""
    options = {"threads": 1, "kv_cache_memory": 0.25, **options}
    engine = TransformersEngine(EngineConfig(model=str(folder), **options), tokens)
    driver = Driver(engine)
    try:
        yield driver
    finally:
        engine.close()
