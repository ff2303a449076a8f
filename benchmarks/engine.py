"""The engine in process: no queue, no HTTP, no text; token ids in, token ids out."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import SequenceRequest, StepOutput
from llmboost_worker.worker import OPENMP

WORKERS_ENV = OPENMP
"""What a worker sets before it loads torch."""


@dataclass
class Run:
    """What some requests took, in seconds."""

    seconds: float
    tokens: int
    ttft: list[float]
    """Of each request, from `add` to its first token."""
    steps: list[float]
    """Between two steps in which every running sequence got a token, and nothing else was computed."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class InProcess:
    """An engine that keeps so many requests running."""

    def __init__(self, model: str, **config: Any) -> None:
        from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine

        self._engine = TransformersEngine(EngineConfig(model=model, **config))
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._rounds = 0
        self._engine.start(self._on_step, self._on_failure)

    def __call__(self, prompts: list[list[int]], max_tokens: list[int], concurrency: int) -> Run:
        """Runs them all, `concurrency` at a time; greedy."""
        self._rounds += 1
        self._waiting = [
            SequenceRequest(
                id=f"{self._rounds}-{number}",
                prompt_ids=prompt,
                sampling=SamplingParams(temperature=0.0, ignore_eos=True),
                max_tokens=length,
            )
            for number, (prompt, length) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        self._waiting.reverse()
        self._sent: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._steps: list[tuple[float, frozenset[str]]] = []
        self._left, self._tokens = len(prompts), 0
        began = time.perf_counter()
        with self._changed:
            self._add([self._waiting.pop() for _ in range(min(concurrency, len(prompts)))])
            self._changed.wait_for(lambda: self._left == 0 or self._failure)
        if self._failure is not None:
            raise self._failure
        steps = [
            after - before
            for (before, ids), (after, next_ids) in zip(self._steps, self._steps[1:], strict=False)
            if ids == next_ids and len(ids) == concurrency
        ]
        ttft = [self._first[id] - sent for id, sent in self._sent.items()]
        return Run(self._steps[-1][0] - began, self._tokens, ttft, steps)

    def _add(self, requests: list[SequenceRequest]) -> None:
        now = time.perf_counter()
        self._sent.update((request.id, now) for request in requests)
        self._engine.add(requests)

    def _on_step(self, outputs: StepOutput) -> None:
        now = time.perf_counter()
        with self._changed:
            for output in outputs:
                if output.error is not None:
                    self._failure = RuntimeError(output.error)
                self._first.setdefault(output.id, now)
                self._tokens += len(output.token_ids)
            self._steps.append((now, frozenset(output.id for output in outputs)))
            ended = sum(output.finish_reason is not None for output in outputs)
            self._left -= ended
            self._add([self._waiting.pop() for _ in range(min(ended, len(self._waiting)))])
            if self._left == 0 or self._failure:
                self._changed.notify()

    def _on_failure(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify()


def in_process(model: Path, dtype: str, threads: int, **config: Any) -> InProcess:
    """For a `Child`."""
    return InProcess(str(model), dtype=dtype, threads=threads, **config)
