"""Steps of many sequences over a cache full of numbers, for the tests of attention on GPUs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.attention.backend import Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.blocks import BlockTable

HEADS, KEY_HEADS, DIM = 6, 2, 16

FORMULAS = {
    "plain": Formula(0.3, None, None),
    "softcap": Formula(0.5, 2.0, None),
    "window": Formula(0.3, None, 6),
    "softcap and window": Formula(0.3, 5.0, 300),
    "sinks": Formula(0.3, None, 6, torch.linspace(-1, 2, HEADS)),
}
CHUNKS = {
    "one row": [(0, 1)],
    "rows": [(300, 1), (7, 1), (0, 1), (255, 1), (256, 1)],
    "a prompt": [(0, 40)],
    "rows and chunks": [(40, 1), (300, 1), (0, 5), (300, 30), (5, 9), (250, 20)],
}
"""Tokens in the cache before the step, and in it."""


@dataclass
class Chunk:
    num_cached: int
    num_scheduled: int
    table: BlockTable = field(default_factory=BlockTable)


@dataclass
class Numbers:
    """A step's tensors."""

    layout: StepLayout
    keys: Tensor
    values: Tensor
    query: Tensor


def numbers(chunks: list[tuple[int, int]], block_size: int, dtype: torch.dtype) -> Numbers:
    """Each sequence's blocks lie scattered; block 0 is nobody's."""
    torch.manual_seed(0)
    needed = [-(-sum(chunk) // block_size) for chunk in chunks]
    blocks = (1 + torch.randperm(sum(needed))).tolist()
    sequences = []
    for chunk, count in zip(chunks, needed, strict=True):
        sequences.append(Chunk(*chunk))
        sequences[-1].table.blocks.extend(blocks.pop() for _ in range(count))
    layout = StepLayout.of(sequences, block_size, torch.device("cpu"))
    keys, values = torch.randn(2, sum(needed) + 1, block_size, KEY_HEADS, DIM).to(dtype)
    query = torch.randn(HEADS, len(layout.slots), DIM).to(dtype).transpose(0, 1)
    return Numbers(layout, keys, values, query)
