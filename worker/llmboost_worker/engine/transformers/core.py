"""The compute half of the engine: a model, its cache and the loop's three verbs. No threads, no callers."""

from llmboost_worker.engine.grammar import MatcherThread
from llmboost_worker.engine.interface import (
    EngineInfo,
    EngineStats,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from llmboost_worker.engine.transformers import loader, selftest
from llmboost_worker.engine.transformers.cache import SlotCache
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sampler import Draw
from llmboost_worker.engine.transformers.scheduler import Scheduler
from llmboost_worker.engine.transformers.sequence import Sequence


class EngineCore:
    """Everything here belongs to the thread that made it.

    Raises:
        EngineError: the model can't be loaded or can't be served.
    """

    def __init__(self, config: EngineConfig) -> None:
        loaded = loader.load(config)
        self.info = EngineInfo(
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.vocab_size,
            max_num_seqs=config.max_num_seqs,
            eos_token_ids=loaded.eos_token_ids,
            engine="transformers",
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
        )
        self._cache = SlotCache(
            layers=loaded.layers,
            max_len=loaded.max_model_len,
            max_slots=config.max_num_seqs,
            max_bytes=loader.cache_bytes(config, loaded),
            dtype=loaded.dtype,
            device=loaded.device,
        )
        self._runner = ModelRunner(loaded.model, loaded.device)
        selftest.run(loaded, self._runner, self.info)
        self._scheduler = Scheduler(
            self._cache, config.max_num_seqs, config.max_num_batched_tokens, config.enable_chunked_prefill
        )
        self._matchers = MatcherThread()
        self._ended: StepOutput = []
        """Of sequences that end without having run."""
        self._arrivals = 0
        self._steps = self._prompt_tokens = self._output_tokens = 0

    @property
    def is_idle(self) -> bool:
        """A step would do nothing."""
        return not self._scheduler.running and not self._scheduler.num_waiting and not self._ended

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self._scheduler.num_waiting,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
        )

    def add(self, requests: list[SequenceRequest]) -> None:
        """Requests that can't run, and those that were complete already, end in the next step's output."""
        for request in requests:
            self._arrivals += 1
            try:
                sequence = Sequence(request, self.info, self._arrivals)
            except Exception as error:  # whatever is wrong with a request is its own affair
                self._ended.append(_failure(request.id, str(error)))
                continue
            if reason := sequence.finish_reason():
                self._ended.append(SequenceOutput(request.id, [], None, reason))
            else:
                self._scheduler.add(sequence)

    def cancel(self, ids: list[str]) -> None:
        for id in ids:
            self._scheduler.remove(id)

    def trim(self) -> None:
        """Gives back memory that no sequence uses."""
        self._cache.trim()

    def step(self) -> StepOutput:
        batch = self._scheduler.schedule()
        self._matchers.start(
            [(each.matcher, each.tokens) for each in batch if each.matcher is not None and each.is_sampled]
        )
        draws = self._runner.run(batch) if batch else {}
        ended, self._ended = self._ended, []
        return ended + self._postprocess(batch, draws)

    def _postprocess(self, batch: list[Sequence], draws: dict[str, Draw]) -> StepOutput:
        """Takes what was drawn into the sequences and ends those that are done."""
        outputs = [
            _failure(sequence.id, f"no memory for the keys and values of {len(sequence)} tokens")
            for sequence in self._scheduler.take_refused()
        ]
        self._steps += bool(batch)
        for sequence in batch:
            self._prompt_tokens += max(
                0, min(sequence.num_scheduled, sequence.num_prompt - sequence.num_cached)
            )
            sequence.num_cached += sequence.num_scheduled
            draw = draws.get(sequence.id)
            if draw is None:
                continue  # in the middle of its prompt
            if draw.error is not None:
                outputs.append(_failure(sequence.id, draw.error))
                self._scheduler.remove(sequence.id)
                continue
            sequence.append(draw.token)
            self._output_tokens += 1
            reason = sequence.finish_reason()
            logprobs = None if draw.logprobs is None else [draw.logprobs]
            outputs.append(SequenceOutput(sequence.id, [draw.token], logprobs, reason))
            if reason:
                self._scheduler.remove(sequence.id)
        return outputs


def _failure(id: str, error: str) -> SequenceOutput:
    return SequenceOutput(id, [], None, "error", error)
