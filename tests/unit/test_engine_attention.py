"""Attention over blocks against the plain formula, on any mixture of rows; and nothing else is touched."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmboost_worker.engine.transformers.attention import torch_backend
from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.blocks import BlockManager, BlockTable

SIZE = 4
CPU = torch.device("cpu")
HEADS, KEY_HEADS, KEY_DIM, VALUE_DIM = 6, 2, 8, 5


@dataclass
class Rows:
    """Of one sequence: how many are computed, and how many this step computes."""

    num_cached: int
    num_scheduled: int
    table: BlockTable


def plain(query: Tensor, keys: Tensor, values: Tensor, how: Formula) -> Tensor:
    """The last rows [rows, heads, dim] over all [tokens, heads, dim] of one sequence, in double precision."""
    repeats = HEADS // KEY_HEADS
    keys, values = (each.double().repeat_interleave(repeats, 1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * how.scale
    if how.softcap:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    position = torch.arange(len(keys) - len(query), len(keys))[:, None]
    key = torch.arange(len(keys))
    hidden = key > position
    if how.window:
        hidden |= key <= position - how.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def check(backend: AttentionBackend, sizes: list[tuple[int, int]], how: Formula) -> None:
    """`sizes`: tokens before this step, and in it. Memory beyond each sequence's end holds large numbers."""
    generator = torch.Generator().manual_seed(len(sizes))
    manager = BlockManager(1 + sum(-(-(a + b) // SIZE) for a, b in sizes), SIZE)
    layer_keys = torch.full((manager.num_blocks + 1, SIZE, KEY_HEADS, KEY_DIM), 1e3)
    layer_values = torch.full((manager.num_blocks + 1, SIZE, KEY_HEADS, VALUE_DIM), 1e3)
    rows = []
    for number, (cached, scheduled) in enumerate(sizes):
        table = BlockTable()
        manager.allocate(table, [number] * (cached + scheduled))
        rows.append(Rows(cached, scheduled, table))
    rows.sort(key=lambda one: one.num_scheduled > 1)
    contents = []
    for one in rows:
        total = one.num_cached + one.num_scheduled
        keys = torch.randn(total, KEY_HEADS, KEY_DIM, generator=generator)
        values = torch.randn(total, KEY_HEADS, VALUE_DIM, generator=generator)
        for position in range(one.num_cached):
            block, offset = one.table.blocks[position // SIZE], position % SIZE
            layer_keys[block, offset], layer_values[block, offset] = keys[position], values[position]
        contents.append((keys, values))
    layout = StepLayout.of(rows, SIZE, CPU)
    query = torch.randn(HEADS, len(layout.slots), KEY_DIM, generator=generator).transpose(0, 1)
    new_keys, new_values = (
        torch.cat([each[one.num_cached :] for one, each in zip(rows, kind, strict=True)])
        for kind in zip(*contents, strict=True)
    )
    backend.write(layer_keys, layer_values, new_keys, new_values, layout)
    out = backend.attend(layer_keys, layer_values, query, layout, how)
    starts = layout.query_starts.tolist()
    for i, (keys, values) in enumerate(contents):
        mine = slice(starts[i], starts[i + 1])
        torch.testing.assert_close(
            out[mine].double(), plain(query[mine], keys, values, how), rtol=1e-4, atol=1e-5
        )
    written = {(slot // SIZE, slot % SIZE) for slot in layout.slots.tolist()}
    assert len(written) == len(new_keys)
    assert float(layer_keys[0].min()) == 1e3, "nobody's block was written to"


FORMULAS = [
    Formula(KEY_DIM**-0.5, None, None),
    Formula(0.3, 2.0, None),
    Formula(0.3, None, 6),
    Formula(0.3, 5.0, 11),
]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(st.integers(0, 60), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=9
    ),
    how=st.sampled_from(FORMULAS),
)
def test_any_mixture_of_rows_sees_what_it_should(sizes: list[tuple[int, int]], how: Formula) -> None:
    check(TorchBackend(), sizes, how)


@pytest.mark.parametrize("how", FORMULAS, ids=str)
def test_long_prompts_are_attended_piece_by_piece(how: Formula, monkeypatch: pytest.MonkeyPatch) -> None:
    """From empty and behind others, beside decoding rows; with small bounds, in many pieces and groups."""
    for name, bound in (("QUERY_BLOCK", 16), ("CAUSAL", 32), ("MOST_BLOCKS", 40), ("MOST_SCORES", 2000)):
        monkeypatch.setattr(torch_backend, name, bound)
    check(TorchBackend(), [(0, 70), (33, 50), (100, 1), (5, 1), (6, 1), (0, 33), (0, 1), (64, 64)], how)


def test_a_layout_is_that_of_flash_attention() -> None:
    """Rows, lengths, tables and slots of a decoding sequence and two chunks."""
    manager = BlockManager(20, SIZE)
    tables = [BlockTable() for _ in range(3)]
    for number, (table, length) in enumerate(zip(tables, (6, 9, 3), strict=True)):
        manager.allocate(table, [number] * length)
    rows = [Rows(5, 1, tables[0]), Rows(7, 2, tables[1]), Rows(0, 3, tables[2])]
    layout = StepLayout.of(rows, SIZE, CPU)
    assert layout.query_starts.tolist() == [0, 1, 3, 6]
    assert layout.lengths.tolist() == [6, 9, 3]
    assert layout.block_tables.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
    assert layout.positions.tolist() == [5, 7, 8, 0, 1, 2]
    assert layout.slots.tolist() == [2 * 4 + 1, 4 * 4 + 3, 5 * 4, 6 * 4, 6 * 4 + 1, 6 * 4 + 2]
    assert (layout.block_tables.dtype, layout.slots.dtype) == (torch.int32, torch.int64)
    assert layout.num_single == 1
