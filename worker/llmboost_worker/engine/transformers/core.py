"""The compute half of the engine: a model, its cache and the loop's three verbs. No threads, no callers."""

import logging

from llmboost_worker.engine.interface import (
    EngineInfo,
    EngineStats,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from llmboost_worker.engine.transformers import failures, loader, selftest
from llmboost_worker.engine.transformers.cache import SlotCache
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sampler import Draw
from llmboost_worker.engine.transformers.scheduler import Scheduler
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)


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
        self._sequences: dict[str, Sequence] = {}
        """Those that the scheduler has."""
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
            except MemoryError as error:
                self._ended.append(_failure(request.id, failures.explain(error)))
                continue
            except Exception as error:  # whatever is wrong with a request is its own affair
                self._ended.append(_failure(request.id, str(error), is_refused=True))
                continue
            reason = sequence.finish_reason()
            if reason and not sequence.is_scored:
                of_prompt = sequence.prompt_logprobs
                self._ended.append(SequenceOutput(request.id, [], None, reason, prompt_logprobs=of_prompt))
            else:
                self._sequences[sequence.id] = sequence
                self._scheduler.add(sequence)

    def cancel(self, ids: list[str]) -> None:
        for id in ids:
            self._remove(id)

    def _remove(self, id: str) -> None:
        self._sequences.pop(id, None)
        self._scheduler.remove(id)

    def trim(self) -> None:
        """Gives back memory that no sequence uses."""
        self._cache.trim()

    def step(self) -> StepOutput:
        """
        Raises:
            torch.AcceleratorError: the device is lost; nothing can be computed any more.
        """
        ended, self._ended = self._ended, []
        try:
            batch = self._scheduler.schedule()
        except Exception as error:
            if failures.is_device_lost(error):
                raise
            return ended + self._fail_all(error)
        draws = self._runner.run(batch) if batch else {}
        return ended + self._postprocess(batch, draws)

    def _fail_all(self, error: Exception) -> StepOutput:
        """Nobody knows which sequence it was, nor what was half done: all of them end, and the next ones find
        everything free."""
        logger.exception("no step can be scheduled; all %d sequences fail", len(self._sequences))
        ids = list(self._sequences)
        for id in ids:
            self._remove(id)
        return [_failure(id, failures.explain(error)) for id in ids]

    def _postprocess(self, batch: list[Sequence], draws: dict[str, Draw]) -> StepOutput:
        """Takes what was drawn into the sequences and ends those that are done."""
        outputs = []
        for sequence in self._scheduler.take_refused():
            self._remove(sequence.id)
            outputs.append(
                _failure(sequence.id, f"no memory for the keys and values of {len(sequence)} tokens")
            )
        self._steps += bool(batch)
        for sequence in batch:
            self._prompt_tokens += max(
                0, min(sequence.num_scheduled, sequence.num_prompt - sequence.num_cached)
            )
            sequence.num_cached += sequence.num_scheduled
            draw = draws.get(sequence.id)
            if draw is None:
                continue  # in the middle of its prompt
            try:
                output = self._advance(sequence, draw)
            except Exception as error:
                logger.exception("sequence %s failed after a step", sequence.id)
                output = _failure(sequence.id, failures.explain(error))
            outputs.append(output)
            if output.finish_reason:
                self._remove(sequence.id)
        return outputs

    def _advance(self, sequence: Sequence, draw: Draw) -> SequenceOutput:
        """Takes what was drawn into the sequence."""
        if draw.error is not None:
            return _failure(sequence.id, draw.error, draw.is_refused)
        of_prompt, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        if reason := sequence.finish_reason():  # it ran for the logprobs of its prompt alone
            return SequenceOutput(sequence.id, [], None, reason, prompt_logprobs=of_prompt)
        sequence.append(draw.token)
        self._output_tokens += 1
        logprobs = None if draw.logprobs is None else [draw.logprobs]
        reason = sequence.finish_reason()
        return SequenceOutput(sequence.id, [draw.token], logprobs, reason, prompt_logprobs=of_prompt)


def _failure(id: str, error: str, is_refused: bool = False) -> SequenceOutput:
    return SequenceOutput(id, [], None, "error", error, is_refused)
