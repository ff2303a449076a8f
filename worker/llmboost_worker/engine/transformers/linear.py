"""Products with weights, laid out as the machine's library reads them fastest.

torch's own `linear` takes weights as they lie in a checkpoint, and its libraries rearrange them at every
call. Here they are arranged once, when the model is loaded. Measured on two cores with AMX, a layer of
SmolLM2-135M's shape: float32 1.2 to 1.5 times as fast; bfloat16 1.5 to 2 times, and with kernels of our own
(`tiles`, where there is AMX) 2 to 3.5 times.

What a row comes to doesn't depend on its neighbours but by rounding, as in any product of matrices; with
`tiles` not at all.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmboost_worker.engine.transformers.config import Quantization
from llmboost_worker.engine.transformers.kernels import Kernels, find, tiles

HINT = 32
"""Rows for which the libraries choose a layout; any number may come."""

HALVES = (torch.bfloat16, torch.float16)

FEW_ROWS = 48
"""Up to here int8 weights are multiplied as they are. Beyond, widening them first and leaving the product to
the library is quicker: at twice as many, by a half."""

Product = Callable[[Tensor], Tensor]
"""[rows, in] -> [rows, out]; rows contiguous."""


def product(weight: Tensor, bias: Tensor | None, quantization: Quantization = "none") -> Product:
    """`x @ weight.T + bias`; keeps no reference to `weight` if it has made a copy of its own.

    Args:
        weight: [out, in]
        bias: [out]
    """
    if quantization == "int8":
        return Int8Product(weight, bias)
    if tiles.fits(weight):
        return tiles.Packed(weight, bias).times
    if weight.device.type == "cpu":
        if weight.dtype == torch.float32 and torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
            return MklProduct(weight, bias)
        if weight.dtype in HALVES and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return OneDnnProduct(weight, bias)
    return PlainProduct(weight, bias)


def gated_product(
    weight: Tensor, bias: Tensor | None, kernels: Kernels, quantization: Quantization = "none"
) -> Product:
    """silu(gate) * up, where `product` makes gate and up, one after the other."""
    if quantization == "none" and tiles.fits(weight):
        return tiles.Packed(weight, bias, gated=True).times
    return GatedProduct(product(weight, bias, quantization), kernels)


class GatedProduct:
    """A product, and then the gate."""

    def __init__(self, both: Product, kernels: Kernels) -> None:
        self._both, self._kernels = both, kernels

    def __call__(self, x: Tensor) -> Tensor:
        gate_up = self._both(x)
        out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._kernels.silu_mul(gate_up, out)
        return out


class PlainProduct:
    """torch's."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight, self._bias)


class MklProduct:
    """float32, packed by MKL (`cblas_sgemm_pack`). The same numbers as torch's."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, HINT)
        # The operation asks for the weight as it was, and reads no more of it than its shape as long as it
        # is told that there are as many rows as there are.
        self._shape = weight.new_empty(1).expand(weight.shape)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkl._mkl_linear(x, self._packed, self._shape, self._bias, len(x))
        return out


class OneDnnProduct:
    """bfloat16 or float16, packed by oneDNN."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, HINT)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return out


class Int8Product:
    """Weights in int8 with one scale per output; activations stay as they are.

    Each output's largest weight becomes 127 (symmetric, round to nearest), as torchao's Int8WeightOnlyConfig
    does. torch has a kernel for few rows too (`_weight_int8pack_mm`), which takes ten times as long in
    float32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        wide = weight.float()
        self._scale = wide.abs().amax(1).clamp_(min=1e-12) / 127
        self._weight = (wide / self._scale[:, None]).round_().to(torch.int8)
        self._bias = bias
        self._kernels = find(weight.device, weight.dtype) if Kernels.multiplies(*weight.shape) else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._kernels is not None and len(x) <= FEW_ROWS:
            out = x.new_empty(len(x), len(self._weight))
            self._kernels.int8_product(x.float(), self._weight, self._scale, out)
        else:
            out = nn.functional.linear(x, self._weight.to(x.dtype)) * self._scale.to(x.dtype)
        return out if self._bias is None else out + self._bias


class PackedLinear(nn.Module):
    """Stands in a model for an `nn.Linear`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantization: Quantization) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._product = product(weight, bias, quantization)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous()
        return self._product(rows).view(*x.shape[:-1], self.out_features)
