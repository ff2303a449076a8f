"""An engine without a model: what it generates is a function of the prompt and the position, and it steps
when it is told to."""

import hashlib
import threading
from collections.abc import Callable

from llmboost_worker.engine.interface import (
    Engine,
    EngineInfo,
    EngineStats,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
    TokenLogprobs,
)


def scripted_token(request: SequenceRequest, position: int, vocabulary: list[int]) -> int:
    """The token at a position: by prompt, seed and choice, so that each sequence is its own."""
    key = repr((request.prompt_ids, request.sampling.seed, request.choice, position)).encode()
    return vocabulary[int.from_bytes(hashlib.sha256(key).digest()[:4]) % len(vocabulary)]


def prompt_score(request: SequenceRequest, position: int) -> TokenLogprobs | None:
    """Of the prompt's token at a position: minus that position."""
    if position == 0:
        return None
    token = request.prompt_ids[position]
    top = ((token, -float(position)),) * min(1, request.sampling.prompt_logprobs or 0)
    return TokenLogprobs(-float(position), top)


class ScriptedEngine(Engine):
    """Draws from `vocabulary` by `scripted_token`, or from `script` if the test gives one."""

    def __init__(
        self,
        vocabulary: list[int],
        *,
        max_model_len: int = 1000,
        max_num_seqs: int = 8,
        eos: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self.script: Callable[[SequenceRequest, int], int] = lambda request, position: scripted_token(
            request, position, vocabulary
        )
        self.failing: set[str] = set()
        """Ids of sequences whose next step fails."""
        self.sequences: dict[str, tuple[SequenceRequest, list[int]]] = {}
        self.info = EngineInfo(
            max_model_len, 1000, max_num_seqs, () if eos is None else (eos,), "scripted", "none", "none"
        )
        self.closed = False
        self._steps = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(
        self, on_step: Callable[[StepOutput], None], on_failure: Callable[[BaseException], None]
    ) -> EngineInfo:
        self.on_step = on_step
        return self.info

    def run(self, interval: float) -> None:
        """From now on steps by itself, every so many seconds."""

        def loop() -> None:
            while not self._stop.wait(interval):
                self.step()

        self._thread = threading.Thread(target=loop, daemon=True)
        self._thread.start()

    def add(self, requests: list[SequenceRequest]) -> None:
        with self._lock:
            for request in requests:
                assert request.id not in self.sequences
                self.sequences[request.id] = (request, list(request.output_ids))

    def cancel(self, ids: list[str]) -> None:
        with self._lock:
            for sequence in ids:
                self.sequences.pop(sequence, None)

    def step(self) -> int:
        """One token for every sequence; returns how many there were."""
        with self._lock:
            outputs = [self._advance(*entry) for entry in list(self.sequences.values())]
            for output in outputs:
                if output.finish_reason is not None:
                    del self.sequences[output.id]
            self._steps += 1
        if outputs:
            self.on_step(outputs)
        return len(outputs)

    def _advance(self, request: SequenceRequest, output_ids: list[int]) -> SequenceOutput:
        if request.id in self.failing:
            return SequenceOutput(request.id, [], finish_reason="error", error="scripted failure")
        scores = None
        if request.sampling.prompt_logprobs is not None and not output_ids:
            scores = [prompt_score(request, position) for position in range(len(request.prompt_ids))]
        if request.max_tokens == 0:
            return SequenceOutput(request.id, [], None, "length", prompt_logprobs=scores)
        token = self.script(request, len(output_ids))
        output_ids.append(token)
        finish = None
        if token in self.info.eos_token_ids:
            finish = "stop"
        elif len(output_ids) >= request.max_tokens:
            finish = "length"
        logprobs = None
        if request.sampling.top_logprobs is not None:
            logprobs = [TokenLogprobs(-0.5, ((token, -0.5),) * min(1, request.sampling.top_logprobs))]
        return SequenceOutput(request.id, [token], logprobs, finish, prompt_logprobs=scores)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.sequences), 0, self._steps, 0, 0)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.closed = True
