"""Small random models for the engine's tests, saved as folders, and what drives an engine in a test."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import EngineInfo, SequenceOutput, SequenceRequest, StepOutput
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine

torch.set_num_threads(1)  # the models are too small to gain from more, and the machine may be busy

VOCAB = 300
PAD, EOS = 0, 2
TIMEOUT = 60.0

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Random weights of the usual spread give near-flat logits, where rounding decides the argmax.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
GPT2_COMMON = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2-window": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=9, max_window_layers=1),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "mistral": MistralConfig(**COMMON, sliding_window=8),
    "gemma2": Gemma2Config(
        **COMMON, head_dim=16, sliding_window=8, attn_logit_softcapping=20.0, query_pre_attn_scalar=16
    ),
    "phi": PhiConfig(**COMMON),
    "gpt2": GPT2Config(**GPT2_COMMON),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, sliding_window=None),
}


def save_model(config: PreTrainedConfig, folder: Path, seed: int = 0) -> Path:
    """A random model of that configuration; the same each time."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
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
    cached_tokens: int = field(default=0, compare=False)


class Driver:
    """An engine, and all of its output by sequence."""

    def __init__(self, engine: TransformersEngine) -> None:
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
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.001)

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
def driving(folder: Path, **options: Any) -> Iterator[Driver]:
    """An engine on that folder, closed at the end."""
    options = {"threads": 1, "kv_cache_memory": 0.25, **options}
    engine = TransformersEngine(EngineConfig(model=str(folder), **options))
    driver = Driver(engine)
    try:
        yield driver
    finally:
        engine.close()
