"""Before a model is served: the same tokens through transformers' own forward and through the engine's."""

import logging

import torch
from torch import Tensor

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import EngineError, EngineInfo, SequenceRequest
from llmboost_worker.engine.transformers.architecture import refusal
from llmboost_worker.engine.transformers.attention import NAME
from llmboost_worker.engine.transformers.cache import SlotCache
from llmboost_worker.engine.transformers.loader import REFERENCE, LoadedModel
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Of the distance between the logits, relative to their norm. Rounding makes 1e-6, 1e-3 and 1e-2; positions
or masks gone wrong make 0.3 and more."""


STEPS = ((5, 4, 7), (5, 1, 0), (1, 0, 1))
"""Tokens per step of three sequences: chunks from empty; a chunk that continues, beside a decode row; two
decode rows of different lengths."""


def run(loaded: LoadedModel, runner: ModelRunner, info: EngineInfo) -> None:
    """
    Raises:
        EngineError: the logits differ, or aren't finite, or can't be computed.
    """
    try:
        _run(loaded, runner, info)
    except EngineError:
        raise
    except Exception as error:  # whatever a model's own code raises
        logger.exception("the self-test failed")
        raise refusal(
            loaded.model.config.model_type, f"its self-test failed ({type(error).__name__}: {error})"
        ) from error


def _run(loaded: LoadedModel, runner: ModelRunner, info: EngineInfo) -> None:
    lengths = [sum(sizes) for sizes in zip(*STEPS, strict=True)]
    sequences = [_sequence(length, info) for length in lengths]
    expected = {sequence.id: _reference(loaded, sequence) for sequence in sequences}
    cache = SlotCache(loaded.layers, max(lengths), len(sequences), 1 << 60, loaded.dtype, loaded.device)
    for sequence in sequences:
        sequence.slot = cache.allocate(len(sequence))
    for sizes in STEPS:
        for sequence, size in zip(sequences, sizes, strict=True):
            sequence.num_scheduled = size
        logits, sampled = runner.forward([sequence for sequence in sequences if sequence.num_scheduled])
        for row, sequence in zip(logits, sampled, strict=True):
            _compare(loaded, row, expected[sequence.id])
        for sequence in sequences:
            sequence.num_cached += sequence.num_scheduled


def _sequence(length: int, info: EngineInfo) -> Sequence:
    # Tokens spread over the vocabulary: a fixed multiplicative walk, so that the test is the same each time.
    ids = [(length * 2654435761 + i * 40503) % info.vocab_size for i in range(length)]
    return Sequence(SequenceRequest(f"{length}", ids, SamplingParams(), max_tokens=0), info, arrival=0)


def _reference(loaded: LoadedModel, sequence: Sequence) -> Tensor:
    """[vocabulary], after the last token"""
    loaded.model.set_attn_implementation(REFERENCE)
    try:
        ids = torch.tensor([sequence.tokens], device=loaded.device)
        logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        loaded.model.set_attn_implementation(NAME)
    return logits


def _compare(loaded: LoadedModel, logits: Tensor, expected: Tensor) -> None:
    if not expected.isfinite().all():
        raise EngineError(f"the model's logits are not finite in {loaded.dtype}: choose another dtype")
    logits, expected = logits.double(), expected.double()
    distance = float((logits - expected).norm() / expected.norm().clamp_min(1e-9))
    if not distance <= TOLERANCE.get(loaded.dtype, 1e-1):
        raise refusal(
            loaded.model.config.model_type,
            f"{type(loaded.model).__name__} gives other logits here than in transformers "
            f"(relative distance {distance:.2g})",
        )
