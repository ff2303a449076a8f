"""Before a model is served: the same tokens through transformers' own forward and through the engine's."""

import logging

import torch
from torch import Tensor

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import EngineError, EngineInfo, SequenceRequest
from llmboost_worker.engine.transformers import layertest
from llmboost_worker.engine.transformers.architecture import refusal
from llmboost_worker.engine.transformers.attention import NAME
from llmboost_worker.engine.transformers.blocks import BLOCK_SIZE, BlockManager
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.layout import StepLayout
from llmboost_worker.engine.transformers.loader import REFERENCE, LoadedModel
from llmboost_worker.engine.transformers.runner import ModelRunner, in_order
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Of the distance between logits, or what layers attend to, relative to their norm. Rounding makes 1e-6, 1e-3
and 1e-2 (with a softcap, 5e-2); positions or masks gone wrong make 0.3 and more."""

MOST_NOISE = 0.25
"""The tolerance at most, for a model on which rounding tells more than that."""

STEPS = ((9, 4, 0), (12, 1, 0), (1, 1, 4))
"""Tokens per step of three sequences: chunks from empty; a chunk that continues into another block, beside a
decode row; decode rows of different lengths, beside the rest of a sequence whose first block is the first
one's."""

SHARED = BLOCK_SIZE
"""Tokens with which the first and the last sequence begin."""


def run(loaded: LoadedModel, info: EngineInfo) -> None:
    """
    Raises:
        EngineError: the logits differ, or aren't finite, or can't be computed.
    """
    try:
        _run(loaded, info)
    except EngineError:
        raise
    except Exception as error:  # whatever a model's own code raises
        logger.exception("the self-test failed")
        raise refusal(
            loaded.model.config.model_type, f"its self-test failed ({type(error).__name__}: {error})"
        ) from error


def _run(loaded: LoadedModel, info: EngineInfo) -> None:
    _test_logits(loaded, info)
    try:
        for call, attended, expected in layertest.compare(loaded):
            _compare(loaded, attended, expected, f"attention in layer {call.layer}")
    finally:
        loaded.model.set_attn_implementation(NAME)


def _test_logits(loaded: LoadedModel, info: EngineInfo) -> None:
    first, second, last = (sum(sizes) for sizes in zip(*STEPS, strict=True))
    tokens = [_tokens(first, info), _tokens(second, info), _tokens(first, info)[:SHARED]]
    tokens[2] += _tokens(last, info)
    sequences = [_sequence(str(i), ids, info) for i, ids in enumerate(tokens)]
    expected = {sequence.id: _reference(loaded, sequence) for sequence in sequences}
    noise = dict.fromkeys(expected, 0.0)
    if loaded.dtype != torch.float32:
        noise = {sequence.id: _noise(loaded, sequence, expected[sequence.id]) for sequence in sequences}
    blocks = BlockManager(1 + sum(-(-len(ids) // BLOCK_SIZE) for ids in tokens))
    cache = KeyValueCache(loaded.layers, blocks.num_blocks + 1, BLOCK_SIZE, loaded.dtype, loaded.device)
    runner = ModelRunner(loaded.model, cache, loaded.backend, loaded.device)
    for sizes in STEPS:
        batch = [sequence for sequence, size in zip(sequences, sizes, strict=True) if size]
        for sequence, size in zip(batch, filter(None, sizes), strict=True):
            if not sequence.table.blocks:
                sequence.begin(blocks.allocate(sequence.table, sequence.tokens))
            sequence.num_scheduled = size
        ordered = in_order(batch)
        logits, sampled = runner.forward(ordered, StepLayout.of(ordered, BLOCK_SIZE, loaded.device))
        for row, sequence in zip(logits, sampled, strict=True):
            _compare(loaded, row, expected[sequence.id], "logits", noise[sequence.id])
        for sequence in batch:
            sequence.num_cached += sequence.num_scheduled
            blocks.register(sequence.table, sequence.tokens, sequence.num_cached)
    if any(sequence.num_uncached for sequence in sequences):
        raise AssertionError("the self-test computes something else than it means to")


def _tokens(length: int, info: EngineInfo) -> list[int]:
    # Spread over the vocabulary: a fixed multiplicative walk, so that the test is the same each time.
    return [(length * 2654435761 + i * 40503) % info.vocab_size for i in range(length)]


def _sequence(id: str, ids: list[int], info: EngineInfo) -> Sequence:
    return Sequence(SequenceRequest(id, ids, SamplingParams(), max_tokens=0), info, arrival=0)


def _reference(loaded: LoadedModel, sequence: Sequence, attention: str = REFERENCE) -> Tensor:
    """[vocabulary], after the last token"""
    loaded.model.set_attn_implementation(attention)
    try:
        ids = torch.tensor([sequence.tokens], device=loaded.device)
        logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        loaded.model.set_attn_implementation(NAME)
    return logits


def _noise(loaded: LoadedModel, sequence: Sequence, expected: Tensor) -> float:
    """How far transformers' own two attentions differ. In half precision it may be much: an expert more or
    less, of two that are nearly as likely, is another model."""
    try:
        return _distance(_reference(loaded, sequence, "sdpa"), expected)
    except ValueError:  # not every model has both
        return 0.0


def _compare(loaded: LoadedModel, mine: Tensor, expected: Tensor, what: str, noise: float = 0.0) -> None:
    if not expected.isfinite().all():
        raise EngineError(f"the model's {what} are not finite in {loaded.dtype}: choose another dtype")
    distance = _distance(mine, expected)
    if not distance <= max(TOLERANCE.get(loaded.dtype, 1e-1), min(3 * noise, MOST_NOISE)):
        raise refusal(
            loaded.model.config.model_type,
            f"{type(loaded.model).__name__} gives other {what} here than in transformers "
            f"(relative distance {distance:.2g})",
        )


def _distance(mine: Tensor, expected: Tensor) -> float:
    mine, expected = mine.double(), expected.double()
    return float((mine - expected).norm() / expected.norm().clamp_min(1e-9))
