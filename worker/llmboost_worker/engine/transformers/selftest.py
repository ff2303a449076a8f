"""Before a model is served: the same tokens through transformers' own forward and through the engine's."""

import torch
from torch import Tensor

from llmboost.jobs import SamplingParams
from llmboost_worker.engine.interface import EngineError, EngineInfo, SequenceRequest
from llmboost_worker.engine.transformers.architecture import refusal
from llmboost_worker.engine.transformers.attention import NAME
from llmboost_worker.engine.transformers.blocks import BLOCK_SIZE, BlockManager
from llmboost_worker.engine.transformers.cache import KeyValueCache
from llmboost_worker.engine.transformers.config import Quantization
from llmboost_worker.engine.transformers.layout import StepLayout
from llmboost_worker.engine.transformers.loader import REFERENCE, LoadedModel
from llmboost_worker.engine.transformers.runner import ModelRunner, in_order
from llmboost_worker.engine.transformers.sequence import Sequence

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1, torch.int8: 2e-1}
"""Of the distance between the logits, relative to their norm. Rounding makes 1e-6, 1e-3 and 1e-2, weights in
int8 a few times that; positions or masks gone wrong make 0.3 and more."""


STEPS = ((9, 4, 0), (12, 1, 0), (1, 1, 4))
"""Tokens per step of three sequences: chunks from empty; a chunk that continues into another block, beside a
decode row; decode rows of different lengths, beside the rest of a sequence whose first block is the first
one's."""

SHARED = BLOCK_SIZE
"""Tokens with which the first and the last sequence begin."""


def references(loaded: LoadedModel) -> list[Tensor]:
    """Logits [vocabulary] after the last token of each sequence, as transformers computes them."""
    loaded.model.set_attn_implementation(REFERENCE)
    try:
        return [_reference(loaded, ids) for ids in _sequences(loaded.vocab_size)]
    finally:
        loaded.model.set_attn_implementation(NAME)


def run(loaded: LoadedModel, expected: list[Tensor], quantization: Quantization) -> None:
    """
    Args:
        expected: of `references`

    Raises:
        EngineError: the logits differ, or aren't finite.
    """
    tokens = _sequences(loaded.vocab_size)
    info = EngineInfo(loaded.max_model_len, loaded.vocab_size, len(tokens), (), "", "", "")
    sequences = [_sequence(str(i), ids, info) for i, ids in enumerate(tokens)]
    blocks = BlockManager(1 + sum(-(-len(ids) // BLOCK_SIZE) for ids in tokens))
    cache = KeyValueCache(loaded.layers, blocks.num_blocks + 1, BLOCK_SIZE, loaded.dtype, loaded.device)
    runner = ModelRunner(loaded.forward, cache, loaded.device)
    for sizes in STEPS:
        batch = [sequence for sequence, size in zip(sequences, sizes, strict=True) if size]
        for sequence, size in zip(batch, filter(None, sizes), strict=True):
            if not sequence.table.blocks:
                sequence.begin(blocks.allocate(sequence.table, sequence.tokens))
            sequence.num_scheduled = size
        ordered = in_order(batch)
        logits, sampled = runner.forward(ordered, StepLayout.of(ordered, BLOCK_SIZE, loaded.device))
        for row, sequence in zip(logits, sampled, strict=True):
            _compare(loaded, row, expected[int(sequence.id)], quantization)
        for sequence in batch:
            sequence.num_cached += sequence.num_scheduled
            blocks.register(sequence.table, sequence.tokens, sequence.num_cached)
    if any(sequence.num_uncached for sequence in sequences):
        raise AssertionError("the self-test computes something else than it means to")


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


def _reference(loaded: LoadedModel, tokens: list[int]) -> Tensor:
    ids = torch.tensor([tokens], device=loaded.device)
    logits: Tensor = loaded.model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits


def _compare(loaded: LoadedModel, logits: Tensor, expected: Tensor, quantization: Quantization) -> None:
    if not expected.isfinite().all():
        raise EngineError(
            f"the model's logits are not finite in {loaded.dtype}: choose another dtype; if it is the one "
            "that the model was made for, its weights are damaged: fetch them again"
        )
    logits, expected = logits.double(), expected.double()
    distance = float((logits - expected).norm() / expected.norm().clamp_min(1e-9))
    if not distance <= TOLERANCE[torch.int8 if quantization == "int8" else loaded.dtype]:
        raise refusal(
            loaded.config.model_type,
            f"{type(loaded.model).__name__} gives other logits here than in transformers "
            f"(relative distance {distance:.2g})",
        )
