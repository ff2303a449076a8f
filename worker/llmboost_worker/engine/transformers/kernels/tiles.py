"""Products of bfloat16 rows with packed weights, and attention of chunks of prompts, on Intel's AMX."""

import ctypes
from ctypes import c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.kernels.arguments import MAX_DIM, Attention
from llmboost_worker.engine.transformers.kernels.build import BuildError, loaded

STEP = 32
BLOCK = 32
TILE = 16
"""As in tiles.cpp and amx.h."""


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
        pack = _function("tiles_pack", *[c_void_p] * 2, *[c_int] * 2)
        pack(arranged.data_ptr(), self._weight.data_ptr(), outputs, self._inputs)
        self._bias: Tensor | None = None
        if bias is not None:
            self._bias = torch.zeros(size)
            self._bias[:outputs] = _halves_alternating(bias) if gated else bias
        self._product = _function("tiles_product", *[c_void_p] * 4, *[c_int] * 4)

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


class Chunks:
    """Attention of chunks of prompts: of many rows in a sequence, which all read the tokens before them."""

    def __init__(self) -> None:
        self._attend = _function(
            "attend_chunks",
            *[c_void_p] * 2,
            c_int64,
            *[c_void_p] * 3,
            c_int64,
            *[c_void_p] * 3,
            c_int,
            c_void_p,
        )
        self._packed = torch.empty(0)

    @staticmethod
    def fit(query: Tensor, values: Tensor) -> bool:
        """Whether attention of this shape can be computed here; for tensors as `attend` takes them."""
        (_, block_size, _, value_dim), key_dim = values.shape, query.shape[2]
        return (
            query.dtype == torch.bfloat16
            and key_dim % STEP == value_dim % TILE == block_size % TILE == 0
            and max(key_dim, value_dim) <= MAX_DIM
        )

    def attend(
        self,
        how: Attention,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        starts: Tensor,
        positions: Tensor,
        out: Tensor,
        context: int,
    ) -> None:
        """Each row attends to its sequence's tokens up to its own position. Tensors are on the CPU; nobody
        checks.

        Args:
            query: [rows, heads, key_dim], the rows may be further apart
            keys: [blocks, block_size, key_heads, key_dim], the blocks one after the other
            values: [blocks, block_size, key_heads, value_dim], likewise
            tables: [sequences, blocks], int32
            starts: [sequences + 1], int32: sequence i has the rows [starts[i], starts[i + 1])
            positions: [rows], int64
            out: [rows, heads * value_dim], written
            context: tokens of all sequences, these rows included
        """
        num_packed = (context + STEP * len(tables)) * values.shape[2] * values.shape[3]
        if len(self._packed) < num_packed:
            self._packed = out.new_empty(2 * num_packed)
        self._attend(
            ctypes.byref(how),
            query.data_ptr(),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            starts.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            len(tables),
            self._packed.data_ptr(),
        )


def _function(name: str, *arguments: Any) -> Any:
    function = getattr(loaded()[0], name)
    function.argtypes, function.restype = arguments, None
    return function
