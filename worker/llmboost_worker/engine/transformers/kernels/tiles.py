"""Products of bfloat16 rows with packed weights on Intel's AMX."""

import logging
from ctypes import c_int, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.kernels.build import BuildError, loaded

logger = logging.getLogger(__name__)

STEP = 32
BLOCK = 32
TILE = 16
"""As in tiles.cpp."""


def fits(weight: Tensor) -> bool:
    """Whether weights [outputs, inputs] can be packed here."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[1] % STEP == 0
        and usable()
    )


@cache
def usable() -> bool:
    """Whether this machine has tiles, and lets this process use them."""
    try:
        return bool(loaded()[0].tiles_usable())
    except BuildError:  # `kernels.find` says so
        return False


class Packed:
    """Weights and perhaps a bias, for `fits`; keeps no reference to them.

    Gated, the first half of the outputs gates the second: silu(gate) * up, each rounded as if it had been
    stored. That spares writing and reading twice as many outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False) -> None:
        """
        Args:
            weight: [outputs, inputs]; outputs a multiple of 32 if gated
            bias: [outputs]
        """
        outputs, self._inputs = weight.shape
        self._outputs = outputs // 2 if gated else outputs
        self._is_gated = gated
        size = -(-outputs // BLOCK) * BLOCK
        self._weight = weight.new_empty(size, self._inputs)
        arranged = _halves_alternating(weight) if gated else weight.contiguous()
        _function("tiles_pack", 2, 2)(arranged.data_ptr(), self._weight.data_ptr(), outputs, self._inputs)
        self._bias: Tensor | None = None
        if bias is not None:
            self._bias = torch.zeros(size)
            self._bias[:outputs] = _halves_alternating(bias) if gated else bias
        self._product = _function("tiles_product", 4, 4)

    def times(self, x: Tensor) -> Tensor:
        """[rows, inputs] -> [rows, outputs, half of them if gated]; contiguous, nobody checks."""
        out = x.new_empty(len(x), self._outputs)
        self._product(
            x.data_ptr(),
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            out.data_ptr(),
            len(x),
            self._outputs,
            self._inputs,
            self._is_gated,
        )
        return out


def _halves_alternating(x: Tensor) -> Tensor:
    """[2 * n, ...]: a tile of the first half, one of the second, and so on."""
    return x.view(2, -1, TILE, *x.shape[1:]).transpose(0, 1).reshape(x.shape)


def _function(name: str, pointers: int, numbers: int) -> Any:
    function = getattr(loaded()[0], name)
    function.argtypes, function.restype = [c_void_p] * pointers + [c_int] * numbers, None
    return function
