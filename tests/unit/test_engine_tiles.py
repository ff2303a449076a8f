"""Products on AMX, where a machine has it; elsewhere the library's are used, and held against the same."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from llmboost_worker.engine.transformers.kernels import Kernels, tiles
from llmboost_worker.engine.transformers.linear import PackedLinear, Product, gated_product, product

ROWS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65, 160, 161, 300, 1000]
"""Around the edges of tiles, blocks, threads' shares and what fits into a core's cache."""


@pytest.fixture(params=[1, 2, 3, 4, 6])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def rows(count: int, inputs: int) -> Tensor:
    return torch.randn(count, inputs).bfloat16()


def alone(multiply: Product, x: Tensor, out: Tensor) -> bool:
    """Whether some rows come to the same, bit for bit, without the others."""
    chosen = {0, len(x) // 2, len(x) - 1} if len(x) else set()
    return all(torch.equal(multiply(x[i : i + 1].contiguous())[0], out[i]) for i in chosen)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(96, 64), (97, 32), (1, 32), (31, 96), (576, 1536), (200, 4096)]
)
def test_every_shape_is_torchs_and_no_row_depends_on_others(
    outputs: int, inputs: int, bias: bool, threads: int
) -> None:
    torch.manual_seed(0)
    weight, biases = rows(outputs, inputs), rows(outputs, 1)[:, 0] if bias else None
    multiply = product(weight, biases)
    for count in ROWS:
        x = rows(count, inputs)
        out = multiply(x)
        exact = linear(x.float(), weight.float(), None if biases is None else biases.float())
        assert out.dtype == torch.bfloat16
        assert ((out.float() - exact).abs() <= exact.abs() * 2**-8 + 2e-2).all(), count
        assert not tiles.usable() or alone(multiply, x, out), count


@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_rounds_where_the_modules_do(bias: bool, threads: int) -> None:
    torch.manual_seed(0)
    weight, biases = rows(2 * 48, 64), rows(2 * 48, 1)[:, 0] if bias else None
    multiply = gated_product(weight, biases, Kernels(torch.bfloat16))
    for count in ROWS:
        x = rows(count, 64)
        out = multiply(x)
        gate, up = product(weight, biases)(x).chunk(2, 1)
        expected = silu(gate) * up
        assert torch.allclose(out.float(), expected.float(), rtol=2**-7, atol=1e-30), count
        assert not tiles.usable() or alone(multiply, x, out), count


def test_what_is_not_a_number_stays_in_its_row() -> None:
    torch.manual_seed(0)
    multiply = product(rows(64, 64), None)
    x = rows(40, 64)
    expected = multiply(x)
    x[7, 3], x[20, 0] = torch.nan, torch.inf
    out = multiply(x)
    wrong = (~out.isfinite()).any(1)
    assert wrong.nonzero()[:, 0].tolist() == [7, 20]
    assert torch.allclose(out[~wrong], expected[~wrong], rtol=1e-2)


def test_rows_that_lie_apart_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    weight, wide = rows(64, 32), rows(20, 96)
    module = PackedLinear(weight, None, "none")
    assert torch.equal(module(wide[:, 32:64]), module(wide[:, 32:64].clone()))
