"""The compiled kernels compute what torch's operations do."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from llmboost_worker.engine.transformers.attention.backend import Formula
from llmboost_worker.engine.transformers.attention.compiled_backend import SHORT, CompiledBackend
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.blocks import BlockTable
from llmboost_worker.engine.transformers.kernels import PART, Kernels, Rotation

BLOCK_SIZE = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""bfloat16 has eight bits: half a unit in the last place of a 4 is 1.6e-2."""

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dataclass
class Chunk:
    """Of a sequence: `num_cached` tokens are in the cache, `num_scheduled` follow."""

    num_cached: int
    num_scheduled: int
    table: BlockTable = field(default_factory=BlockTable)


def step(chunks: list[tuple[int, int]]) -> tuple[StepLayout, int]:
    """A layout of sequences whose blocks lie scattered, and the number of blocks."""
    needed = [-(-sum(chunk) // BLOCK_SIZE) for chunk in chunks]
    blocks = torch.randperm(sum(needed) + 1).tolist()
    sequences = []
    for chunk, count in zip(chunks, needed, strict=True):
        sequences.append(Chunk(*chunk))
        sequences[-1].table.blocks.extend(blocks.pop() for _ in range(count))
    return StepLayout.of(sequences, BLOCK_SIZE, torch.device("cpu")), sum(needed) + 1


def close(actual: Tensor, expected: Tensor) -> bool:
    return torch.allclose(actual.float(), expected.float(), atol=TOLERANCE[actual.dtype], rtol=1e-2)


STEPS = {
    "one row": [(0, 1)],
    "one long row": [(3 * PART + 5, 1)],
    "rows of many lengths": [(i * 37, 1) for i in range(12)] + [(PART - 1, 1), (PART, 1), (2 * PART, 1)],
    "rows and chunks": [(40, 1), (700, 1), (0, 5), (300, SHORT), (0, SHORT + 1), (90, 100)],
    "a long prompt alone": [(0, 200)],
}


@dtypes
@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    "formula",
    [Formula(0.125, None, None), Formula(0.3, None, 100), Formula(0.125, 5.0, None)],
    ids=["plain", "window", "softcap"],
)
@pytest.mark.parametrize(
    ("heads", "key_heads", "key_dim", "value_dim"), [(9, 3, 64, 64), (8, 1, 32, 48), (6, 6, 16, 16)]
)
def test_attention_over_blocks_is_torchs(
    dtype: torch.dtype,
    chunks: list[tuple[int, int]],
    formula: Formula,
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    torch.manual_seed(0)
    layout, num_blocks = step(chunks)
    keys = torch.randn(num_blocks, BLOCK_SIZE, key_heads, key_dim).to(dtype)
    values = torch.randn(num_blocks, BLOCK_SIZE, key_heads, value_dim).to(dtype)
    rows = torch.randn(len(layout.slots), heads * key_dim + 7).to(dtype)
    query = rows[:, : heads * key_dim].view(len(rows), heads, key_dim)
    actual = CompiledBackend(Kernels(dtype)).attend(keys, values, query, layout, formula)
    layout.plans.clear()
    expected = TorchBackend().attend(keys.float(), values.float(), query.float(), layout, formula)
    assert close(actual, expected)


@dtypes
def test_a_row_is_the_same_to_the_bit_alone_and_among_others(dtype: torch.dtype) -> None:
    """Alone, its context is shared out among the threads; among others, it isn't."""
    torch.manual_seed(0)
    layout, num_blocks = step([(900, 1)] + [(50, 1)] * 40)
    keys, values = (torch.randn(num_blocks, BLOCK_SIZE, 2, 32).to(dtype) for _ in range(2))
    query = torch.randn(len(layout.slots), 4, 32).to(dtype)
    backend, formula = CompiledBackend(Kernels(dtype)), Formula(0.2, None, None)
    among = backend.attend(keys, values, query, layout, formula)
    alone = Chunk(900, 1)
    alone.table.blocks.extend(layout.tables[0].tolist())
    single = StepLayout.of([alone], BLOCK_SIZE, torch.device("cpu"))
    assert torch.equal(backend.attend(keys, values, query[:1], single, formula)[0], among[0])


@dtypes
@pytest.mark.parametrize("where", ["query", "keys", "values"])
def test_what_is_not_a_number_stays_so_in_its_row_alone(dtype: torch.dtype, where: str) -> None:
    torch.manual_seed(0)
    layout, num_blocks = step([(30, 1), (30, 1)])
    tensors = {
        "query": torch.randn(2, 4, 32).to(dtype),
        "keys": torch.randn(num_blocks, BLOCK_SIZE, 2, 32).to(dtype),
        "values": torch.randn(num_blocks, BLOCK_SIZE, 2, 32).to(dtype),
    }
    tensors[where][0 if where == "query" else int(layout.tables[0, 0]), 0] = torch.nan
    out = CompiledBackend(Kernels(dtype)).attend(
        tensors["keys"], tensors["values"], tensors["query"], layout, Formula(0.2, None, None)
    )
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


@dtypes
@pytest.mark.parametrize("rows", [1, 7, 2000])
def test_norm_after_a_sum(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(n, 48).to(dtype) for n in (rows, rows, 1))
    expected = torch.nn.functional.rms_norm((residual + x).float(), (48,), weight[0].float(), 1e-5)
    total, out = residual + x, torch.empty_like(x)
    Kernels(dtype).add_rms_norm(x, residual, weight[0], 1e-5, out)
    assert torch.equal(residual, total)
    assert close(out, expected)
    Kernels(dtype).add_rms_norm(None, residual, weight[0], 1e-5, out)
    assert torch.equal(residual, total)
    assert close(out, expected)


@dtypes
@pytest.mark.parametrize("rows", [1, 2000])
def test_silu_of_the_gate_times_the_rest(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    both = torch.randn(rows, 96).mul(20).to(dtype)
    both[0, 0], both[0, 1], both[0, 2] = 1e4, -1e4, torch.nan
    out = both.new_empty(rows, 48)
    Kernels(dtype).silu_mul(both, out)
    expected = silu(both[:, :48].float()) * both[:, 48:].float()
    assert torch.allclose(out.float(), expected, atol=1e-3, rtol=TOLERANCE[dtype], equal_nan=True)


@dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotated", [64, 32])
def test_heads_are_normed_and_rotated_and_keys_and_values_stored(
    dtype: torch.dtype, normed: bool, rotated: int
) -> None:
    torch.manual_seed(0)
    heads, key_heads, dim, rows = 4, 2, 64, 5
    cos, sin = torch.randn(100, rotated), torch.randn(100, rotated)
    qkv = torch.randn(rows, (heads + 2 * key_heads) * dim).to(dtype)
    norms = [torch.randn(dim).to(dtype) for _ in range(2)] if normed else [None, None]
    positions, slots = torch.randint(0, 100, (rows,)), torch.randperm(4 * BLOCK_SIZE)[:rows]
    keys, values = (torch.zeros(4, BLOCK_SIZE, key_heads, dim, dtype=dtype) for _ in range(2))

    query, key, value = (
        part.float().view(rows, -1, dim)
        for part in qkv.split([heads * dim, key_heads * dim, key_heads * dim], 1)
    )
    expected = []
    for part, norm in zip((query, key), norms, strict=True):
        if norm is not None:
            part = torch.nn.functional.rms_norm(part, (dim,), norm.float(), 1e-6)
        first, rest = part.split([rotated, dim - rotated], -1)
        half = torch.cat([-first[..., rotated // 2 :], first[..., : rotated // 2]], -1)
        turned = first * cos[positions][:, None] + half * sin[positions][:, None]
        expected.append(torch.cat([turned, rest], -1))

    how = Rotation(heads, key_heads, dim, dim, rotated, cos.data_ptr(), sin.data_ptr(), 1e-6)
    Kernels(dtype).rotate_and_store(qkv, how, *norms, positions, slots, keys, values)
    assert torch.allclose(
        qkv[:, : heads * dim].float(), expected[0].flatten(1), atol=4 * TOLERANCE[dtype], rtol=1e-2
    )
    assert torch.allclose(
        keys.flatten(0, 1)[slots].float(), expected[1], atol=4 * TOLERANCE[dtype], rtol=1e-2
    )
    assert torch.equal(values.flatten(0, 1)[slots].float(), value)
    others = torch.ones(4 * BLOCK_SIZE, dtype=torch.bool)
    others[slots] = False
    assert not keys.flatten(0, 1)[others].any()
    assert not values.flatten(0, 1)[others].any()
