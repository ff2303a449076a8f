"""Before a model is served: the same tokens, and the same rows of attention, through transformers' own code
and through the engine's."""

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import EngineError, EngineInfo, SequenceRequest
from llmboost_worker.engine.transformers.attention.hook import NAME
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.blocks import BLOCK_SIZE, BlockManager
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.config import Quantization
from llmboost_worker.engine.transformers.loading import layertest
from llmboost_worker.engine.transformers.loading.architecture import refusal
from llmboost_worker.engine.transformers.loading.loader import REFERENCE, LoadedModel
from llmboost_worker.engine.transformers.runner import ModelRunner, in_order
from llmboost_worker.engine.transformers.sequence import Sequence

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1, torch.int8: 2e-1}
"""Of the distance between logits, or what layers attend to, relative to their norm. Rounding makes 1e-6, 1e-3
and 1e-2 (5e-2 with a softcap), weights in int8 a few times that; positions or masks gone wrong make 0.3 and
more."""

MOST_NOISE = 0.25
"""The tolerance at most, for a model on which rounding tells more than that."""

STEPS = ((9, 4, 0), (12, 1, 0), (1, 1, 4))
"""Tokens per step of three sequences: chunks from empty; a chunk that continues into another block, beside a
decode row; decode rows of different lengths, beside the rest of a sequence whose first block is the first
one's."""

SHARED = BLOCK_SIZE
"""Tokens with which the first and the last sequence begin."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What transformers computes."""

    logits: list[Tensor]
    """[vocabulary] each: after the last token of each sequence."""
    noise: list[float]
    """Distances between its own two attentions' logits. In half precision it may be much: an expert more or
    less, of two that are nearly as likely, is another model."""
    cases: list[layertest.Case]


def reference(loaded: LoadedModel) -> Reference:
    """Of a model whose weights are all in their places yet.

    Raises:
        EngineError: it can't be computed.
    """
    try:
        logits, noise = _logits(loaded, REFERENCE), [0.0] * len(STEPS[0])
        if loaded.dtype != torch.float32:
            noise = _noise(loaded, logits)
        return Reference(logits, noise, list(layertest.cases(loaded)))
    except Exception as error:  # whatever a model's own code raises
        raise _failed(loaded, error) from error
    finally:
        loaded.model.set_attn_implementation(NAME)


def run(loaded: LoadedModel, expected: Reference, quantization: Quantization) -> None:
    """
    Raises:
        EngineError: what the engine computes differs, or isn't finite, or can't be computed.
    """
    tolerance = TOLERANCE[torch.int8 if quantization == "int8" else loaded.dtype]
    try:
        for case in expected.cases:
            what = f"attention in layer {case.layer}"
            _compare(loaded, layertest.attended(loaded, case), case.expected, what, tolerance)
        for sequence, logits in _computed(loaded):
            noise = min(3 * expected.noise[sequence], MOST_NOISE)
            _compare(loaded, logits, expected.logits[sequence], "logits", max(tolerance, noise), quantization)
    except EngineError:
        raise
    except Exception as error:
        raise _failed(loaded, error) from error


def _logits(loaded: LoadedModel, attention: str) -> list[Tensor]:
    loaded.model.set_attn_implementation(attention)
    sequences = (torch.tensor([ids], device=loaded.device) for ids in _sequences(loaded.vocab_size))
    return [loaded.model(input_ids=ids, use_cache=False).logits[0, -1] for ids in sequences]


def _noise(loaded: LoadedModel, logits: list[Tensor]) -> list[float]:
    try:
        others = _logits(loaded, "sdpa")
    except ValueError:  # not every model has both
        return [0.0] * len(logits)
    return [_distance(other, one) for other, one in zip(others, logits, strict=True)]


def _computed(loaded: LoadedModel) -> list[tuple[int, Tensor]]:
    """Of each sequence, by its number, [vocabulary] after its last token; of some twice, and not all in the
    same step."""
    tokens = _sequences(loaded.vocab_size)
    info = EngineInfo(loaded.max_model_len, loaded.vocab_size, len(tokens), (), "", "", "")
    sequences = [_sequence(str(i), ids, info) for i, ids in enumerate(tokens)]
    size = loaded.forward.backend.block_size
    blocks = BlockManager(1 + sum(-(-len(ids) // size) for ids in tokens), size)
    cache = KeyValueCache(loaded.layers, blocks.num_blocks + 1, size, loaded.dtype, loaded.device)
    runner = ModelRunner(loaded.forward, cache, loaded.device)
    computed: list[tuple[int, Tensor]] = []
    for sizes in STEPS:
        batch = [sequence for sequence, rows in zip(sequences, sizes, strict=True) if rows]
        for sequence, rows in zip(batch, filter(None, sizes), strict=True):
            if not sequence.table.blocks:
                sequence.begin(blocks.allocate(sequence.table, sequence.tokens))
            # Larger blocks than BLOCK_SIZE aren't shared, and more is left for the last step.
            sequence.num_scheduled = sequence.num_uncached if sizes is STEPS[-1] else rows
        ordered = in_order(batch)
        logits, sampled = runner.forward(ordered, StepLayout.of(ordered, size, loaded.device))
        computed += [(int(sequence.id), row) for row, sequence in zip(logits, sampled, strict=True)]
        for sequence in batch:
            sequence.num_cached += sequence.num_scheduled
            blocks.register(sequence.table, sequence.tokens, sequence.num_cached)
    if any(sequence.num_uncached for sequence in sequences):
        raise AssertionError("the self-test computes something else than it means to")
    return computed


def _sequences(vocab_size: int) -> list[list[int]]:
    """Their tokens, spread over the vocabulary: a fixed multiplicative walk, so that the test is the same
    each time."""
    first, second, last = (
        [(length * 2654435761 + i * 40503) % vocab_size for i in range(length)]
        for length in (sum(sizes) for sizes in zip(*STEPS, strict=True))
    )
    return [first, second, first[:SHARED] + last]


def _sequence(id: str, ids: list[int], info: EngineInfo) -> Sequence:
    return Sequence(SequenceRequest(id, ids, SamplingParams(), max_tokens=0), info, arrival=0)


def _compare(
    loaded: LoadedModel,
    mine: Tensor,
    expected: Tensor,
    what: str,
    tolerance: float,
    quantization: Quantization = "none",
) -> None:
    if not expected.isfinite().all():
        raise EngineError(
            f"the model's {what} are not finite in {loaded.dtype}: choose another dtype; if it is the one "
            "that the model was made for, its weights are damaged: fetch them again"
        )
    distance = _distance(mine, expected)
    if quantization == "int8" and tolerance < distance < math.inf:
        raise EngineError(
            f"this {loaded.model.config.model_type!r} model loses too much by weights in int8 (relative "
            f"distance of its {what} {distance:.2g}, {tolerance:.2g} at most): use --quantization none"
        )
    if not distance <= tolerance:
        raise refusal(
            loaded.model.config.model_type,
            f"{type(loaded.model).__name__} gives other {what} here than in transformers "
            f"(relative distance {distance:.2g})",
        )


def _distance(mine: Tensor, expected: Tensor) -> float:
    mine, expected = mine.double(), expected.double()
    return float((mine - expected).norm() / expected.norm().clamp_min(1e-9))


def _failed(loaded: LoadedModel, error: Exception) -> EngineError:
    logger.exception("the self-test failed")
    what = f"its self-test failed ({type(error).__name__}: {error})"
    return refusal(loaded.model.config.model_type, what)
