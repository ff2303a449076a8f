"""The compute half of the engine: a model, its cache and the loop's three verbs. No threads, no callers."""

import logging
from contextlib import suppress

from llmboost_worker.engine.grammar import MatcherThread
from llmboost_worker.engine.interface import (
    EngineInfo,
    EngineStats,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from llmboost_worker.engine.transformers import failures
from llmboost_worker.engine.transformers.blocks import BlockManager
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.loading import loader, ready
from llmboost_worker.engine.transformers.pace import Pace
from llmboost_worker.engine.transformers.ranks import Leader, Place, Ranks, compute_with
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sampling.sampler import Draw
from llmboost_worker.engine.transformers.scheduler import Scheduler
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)


class EngineCore:
    """Everything here belongs to the thread that made it.

    Raises:
        EngineError: the model can't be loaded or can't be served.
    """

    def __init__(self, config: EngineConfig, place: Place | None = None) -> None:
        """`place`: rank 0's, with `config.tp` above 1."""
        self._ranks = None if place is None else Ranks(place, loader.device_of(config))
        loaded = ready.load(config)
        self.info = EngineInfo(
            max_model_len=loaded.max_model_len,
            vocab_size=loaded.vocab_size,
            max_num_seqs=config.max_num_seqs,
            eos_token_ids=loaded.eos_token_ids,
            engine="transformers",
            dtype=str(loaded.dtype).removeprefix("torch."),
            device=str(loaded.device),
        )
        cache = loader.make_cache(config, loaded, self._ranks)
        forward, self._clear = ready.forward(config, loaded, cache), cache.clear
        if self._ranks is not None:
            leader = Leader(self._ranks, forward, cache)
            forward, self._clear = leader, leader.clear
        self._blocks = BlockManager(cache.num_blocks, cache.block_size, config.enable_prefix_caching)
        self._runner = ModelRunner(forward, cache, loaded.device)
        self._pace = Pace()
        self._scheduler = Scheduler(
            self._blocks,
            self._pace,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.enable_chunked_prefill,
        )
        self._sequences: dict[str, Sequence] = {}
        """Those that the scheduler has."""
        self._matchers = MatcherThread()
        self._ended: StepOutput = []
        """Of sequences that end without having run."""
        self._arrivals = 0
        self._steps = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0

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
            cached_tokens=self._cached_tokens,
            blocks_used=self._blocks.num_used,
            blocks_total=self._blocks.num_blocks,
        )

    def add(self, requests: list[SequenceRequest]) -> None:
        """Requests that can't run, and those that were complete already, end in the next step's output."""
        for request in requests:
            self._arrivals += 1
            try:
                sequence = Sequence(request, self.info, self._arrivals)
                if sequence.sampling.grammar is not None and sequence.matcher is None:
                    raise ValueError("its grammar has not been compiled")
                reason = sequence.finish_reason()
                if reason is None or sequence.is_scored:
                    self._scheduler.add(sequence)
                    self._sequences[sequence.id] = sequence
            except MemoryError as error:
                self._ended.append(_failure(request.id, failures.explain(error)))
                continue
            except Exception as error:  # whatever is wrong with a request is its own affair
                self._ended.append(_failure(request.id, str(error), is_refused=True))
                continue
            if reason is not None and not sequence.is_scored:
                of_prompt = sequence.prompt_logprobs
                self._ended.append(SequenceOutput(request.id, [], None, reason, prompt_logprobs=of_prompt))

    def close(self) -> None:
        """Lets the other ranks go, if there are any."""
        if self._ranks is not None:
            with suppress(failures.RankLost):
                self._ranks.send(None)
            self._ranks.leave()

    def cancel(self, ids: list[str]) -> None:
        for id in ids:
            self._remove(id)

    def _remove(self, id: str) -> None:
        self._sequences.pop(id, None)
        self._scheduler.remove(id)

    def step(self) -> StepOutput:
        """
        Raises:
            torch.AcceleratorError: the device is lost; nothing can be computed any more.
        """
        ended, self._ended = self._ended, []
        self._pace.begin()
        try:
            batch = self._scheduler.schedule()
        except Exception as error:
            if failures.is_device_lost(error):
                raise
            return ended + self._fail_all(error)
        self._matchers.start(
            [(each.matcher, each.tokens) for each in batch if each.matcher is not None and each.is_sampled]
        )
        draws = self._runner.run(batch) if batch else {}
        self._learn(batch)
        return ended + self._postprocess(batch, draws)

    def _learn(self, batch: list[Sequence]) -> None:
        """What the step took."""
        chunks = [sequence for sequence in batch if not sequence.is_decoding]
        tokens = sum(sequence.num_scheduled for sequence in chunks)
        pairs = sum(one.num_scheduled * (one.num_cached + one.num_scheduled // 2) for one in chunks)
        self._pace.end(len(batch) - len(chunks), tokens, pairs // max(1, tokens))

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
        outputs: StepOutput = []
        self._steps += bool(batch)
        for sequence in batch:
            draw = draws.get(sequence.id)
            if draw is not None and draw.error is not None:
                outputs.append(_failure(sequence.id, draw.error, draw.is_refused))
                self._clear(self._blocks.unregistered(sequence.table))
                self._remove(sequence.id)
                continue
            self._prompt_tokens += max(
                0, min(sequence.num_scheduled, sequence.num_prompt - sequence.num_cached)
            )
            sequence.num_cached += sequence.num_scheduled
            self._blocks.register(sequence.table, sequence.tokens, sequence.num_cached)
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
        found, sequence.num_found = sequence.num_found or 0, 0
        of_prompt, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        if reason := sequence.finish_reason():  # it ran for the logprobs of its prompt alone
            return SequenceOutput(sequence.id, [], None, reason, prompt_logprobs=of_prompt)
        sequence.append(draw.token)
        self._output_tokens += 1
        self._cached_tokens += found
        logprobs = None if draw.logprobs is None else [draw.logprobs]
        return SequenceOutput(
            sequence.id,
            [draw.token],
            logprobs,
            sequence.finish_reason(),
            cached_tokens=found,
            prompt_logprobs=of_prompt,
        )


def follow(config: EngineConfig, place: Place) -> None:
    """Does on a rank above 0 what the core of rank 0 does, until that closes.

    Raises:
        EngineError: as `EngineCore`.
        RankLost: rank 0 has died.
    """
    ranks = Ranks(place, loader.device_of(config, place.local_rank))
    try:
        loaded = ready.load(config, place.local_rank)
        cache = loader.make_cache(config, loaded, ranks)
        compute_with(ranks, ready.forward(config, loaded, cache), cache, loaded.device)
    finally:
        ranks.leave()


def _failure(id: str, error: str, is_refused: bool = False) -> SequenceOutput:
    return SequenceOutput(id, [], None, "error", error, is_refused)
