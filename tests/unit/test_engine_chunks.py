"""Attention of long chunks in bfloat16: on AMX where a machine has it, elsewhere by torch."""

import pytest
import torch
from torch import Tensor

from llmboost_worker.engine.transformers.attention.backend import Formula
from llmboost_worker.engine.transformers.attention.compiled_backend import (
    SHORT,
    SHORT_ON_AMX,
    CompiledBackend,
)
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.kernels import Kernels, tiles
from tests.unit.test_engine_kernels import BLOCK_SIZE, Chunk, close, step

FORMULAS = {
    "plain": Formula(0.2, None, None),
    "window": Formula(0.2, None, 50),
    "softcap": Formula(0.2, 3.0, None),
    "both": Formula(0.3, 5.0, 130),
}
CHUNKS = {
    "one": [(0, SHORT + 1)],
    "a small one": [(700, SHORT_ON_AMX + 1)],
    "between rows": [(600, 1), (90, SHORT_ON_AMX), (40, SHORT)],
    "whole blocks": [(0, 128), (128, 128)],
    "odd ones": [(5, 33), (127, 130), (300, 17), (0, 257)],
    "a short one far along": [(1000, 20)],
}


class Case:
    """Random queries, keys and values of one layer."""

    def __init__(
        self, chunks: list[tuple[int, int]], heads: int, key_heads: int, key_dim: int, value_dim: int
    ) -> None:
        torch.manual_seed(0)
        self.layout, num_blocks = step(chunks)
        self.keys = torch.randn(num_blocks, BLOCK_SIZE, key_heads, key_dim).bfloat16()
        self.values = torch.randn(num_blocks, BLOCK_SIZE, key_heads, value_dim).bfloat16()
        self.query = torch.randn(len(self.layout.slots), heads, key_dim).bfloat16()

    def attend(
        self, formula: Formula, layout: StepLayout | None = None, query: Tensor | None = None
    ) -> Tensor:
        backend = CompiledBackend(Kernels(torch.bfloat16))
        rows = self.query if query is None else query
        return backend.attend(self.keys, self.values, rows, layout or self.layout, formula)

    def expected(self, formula: Formula) -> Tensor:
        self.layout.plans.clear()
        floats = self.keys.float(), self.values.float(), self.query.float()
        return TorchBackend().attend(*floats, self.layout, formula)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    ("heads", "key_heads", "key_dim", "value_dim"),
    [(9, 3, 64, 64), (8, 1, 32, 48), (2, 2, 128, 128), (4, 2, 256, 256), (3, 1, 96, 80)],
)
def test_attention_of_chunks_is_torchs(
    formula: Formula,
    chunks: list[tuple[int, int]],
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    case = Case(chunks, heads, key_heads, key_dim, value_dim)
    # torch rounds scores too, where they are capped.
    tolerance = 2e-2 if tiles.usable() or formula.softcap is None else 1e-1
    assert torch.allclose(case.attend(formula).float(), case.expected(formula), atol=tolerance, rtol=1e-2)


def test_what_lies_behind_the_last_token_counts_for_nothing() -> None:
    """A block keeps what it was used for before."""
    case = Case([(0, 40), (70, 20)], 9, 3, 64, 64)
    expected = case.attend(Formula(0.2, None, None))
    used = torch.zeros(case.keys.shape[:2], dtype=torch.bool)
    for table, end in zip(case.layout.tables, case.layout.ends, strict=True):
        for token in range(end):
            used[table[token // BLOCK_SIZE], token % BLOCK_SIZE] = True
    case.keys[~used] = case.values[~used] = torch.nan
    case.layout.plans.clear()
    assert torch.equal(case.attend(Formula(0.2, None, None)), expected)


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_a_row_comes_to_the_same_in_whichever_chunk_it_is(formula: Formula) -> None:
    case = Case([(150, 190)], 9, 3, 64, 64)
    whole = case.attend(formula)
    done = 0
    for size in (17, 4, 64, 5, 22, 78):
        part = Chunk(150 + done, size)
        part.table.blocks.extend(int(block) for block in case.layout.tables[0])
        layout = StepLayout.of([part], BLOCK_SIZE, torch.device("cpu"))
        rows = case.query[done : done + size]
        part_out, same = case.attend(formula, layout, rows), whole[done : done + size]
        assert torch.equal(part_out, same) if tiles.usable() else close(part_out, same)
        done += size
    assert done == len(whole)
