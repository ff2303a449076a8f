"""Compiled kernels for a CPU: attention over blocks, and what lies between a layer's matrix products.

A step of a small batch is a few milliseconds, of which calls into torch take a third: thirty layers of forty
operations each. Four calls do what thirty of the forty do, and `tiles` has one for the products. They are
compiled when a model is first loaded; without a compiler torch computes the same, only slower.
"""

import ctypes
import logging
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmboost_worker.engine.transformers.kernels.arguments import MAX_DIM, WIDTH, Attention, Rotation
from llmboost_worker.engine.transformers.kernels.build import BuildError, loaded

logger = logging.getLogger(__name__)

MAX_QUERIES = 64
PART = 256
"""As in kernels.cpp."""

TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

__all__ = ["MAX_DIM", "WIDTH", "Attention", "BuildError", "Kernels", "Rotation", "find"]


class Kernels:
    """The kernels for one dtype. Tensors are contiguous and on the CPU; nobody checks.

    Raises:
        BuildError: they can't be had on this machine.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        name = TYPES[dtype]
        self._attend = _function(f"attend_{name}")
        self._add_rms_norm = _function(f"add_rms_norm_{name}")
        self._silu_mul = _function(f"silu_mul_{name}")
        self._rotate_and_store = _function(f"rotate_and_store_{name}")
        self._int8_product = _function(f"int8_product_{name}")

    @staticmethod
    def attends(heads: int, key_heads: int, key_dim: int, value_dim: int) -> bool:
        """Whether attention of this shape can be computed here."""
        return (
            heads % key_heads == 0
            and heads // key_heads <= MAX_QUERIES
            and max(key_dim, value_dim) <= MAX_DIM
            and key_dim % WIDTH == value_dim % WIDTH == 0
        )

    def attend(
        self,
        how: Attention,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        owners: Tensor,
        starts: Tensor,
        positions: Tensor,
        out: Tensor,
        scratch: Tensor | None,
        most_parts: int,
        size: int,
    ) -> None:
        """Each row attends to its sequence's tokens up to its own position.

        Rows come in groups of neighbours in one sequence, of at most `MAX_QUERIES` per key head.

        Args:
            query: [rows, at least heads * key_dim], the rows may be further apart
            keys: [blocks, block_size, key_heads, key_dim]
            values: [blocks, block_size, key_heads, value_dim]
            tables: [sequences, blocks], int32
            owners: [groups], int32: the row of `tables` that is each one's
            starts: [groups + 1], int32: group i has the rows [starts[i], starts[i + 1])
            positions: [rows], int64
            out: [rows, heads * value_dim], written
            scratch: float32 [groups, key_heads, most_parts, size]; with it, the parts of a group's context
                are shared out among threads
            most_parts: what `PART` tokens of context each make, at most
            size: `value_dim + 2` for each of a group's queries
        """
        self._attend(
            ctypes.byref(how),
            query.data_ptr(),
            query.stride(0),
            keys.data_ptr(),
            values.data_ptr(),
            tables.data_ptr(),
            tables.stride(0),
            owners.data_ptr(),
            starts.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            len(owners),
            None if scratch is None else scratch.data_ptr(),
            most_parts,
            size,
        )

    def add_rms_norm(
        self, x: Tensor | None, residual: Tensor, weight: Tensor, epsilon: float, out: Tensor
    ) -> None:
        """residual += x, out = its RMS norm; all [rows, dim], the dim a multiple of `WIDTH`."""
        rows, dim = residual.shape
        self._add_rms_norm(
            None if x is None else x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            epsilon,
            out.data_ptr(),
            rows,
            dim,
        )

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        """out [rows, dim] = silu(gate) * up of `gate_up` [rows, 2 * dim]."""
        self._silu_mul(gate_up.data_ptr(), out.data_ptr(), *out.shape)

    def rotate_and_store(
        self,
        qkv: Tensor,
        how: Rotation,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Norms and rotates the heads of `qkv` [rows, queries + keys + values] where they are, and writes
        keys and values into their slots."""
        self._rotate_and_store(
            qkv.data_ptr(),
            ctypes.byref(how),
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            len(qkv),
        )

    @staticmethod
    def multiplies(outputs: int, inputs: int) -> bool:
        """Whether `int8_product` can be used with weights of this shape."""
        return outputs % 4 == inputs % WIDTH == 0

    def int8_product(self, x: Tensor, weight: Tensor, scale: Tensor, out: Tensor) -> None:
        """out [rows, outputs] = x @ weight.T * scale.

        Args:
            x: [rows, inputs], float32
            weight: [outputs, inputs], int8
            scale: [outputs], float32
        """
        rows, outputs = out.shape
        self._int8_product(
            x.data_ptr(),
            weight.data_ptr(),
            scale.data_ptr(),
            out.data_ptr(),
            rows,
            outputs,
            weight.shape[1],
        )


@cache
def find(device: torch.device, dtype: torch.dtype) -> Kernels | None:
    """The kernels, if there are any for this, and the machine can compile them."""
    if device.type != "cpu" or dtype not in TYPES:
        return None
    try:
        return Kernels(dtype)
    except BuildError as error:
        logger.warning("no compiled kernels, so this takes longer than it could: %s", error)
        return None


ARGUMENTS = {
    "attend": [
        *([c_void_p] * 2),
        c_int64,
        *([c_void_p] * 3),
        c_int64,
        *([c_void_p] * 4),
        c_int,
        c_void_p,
        c_int,
        c_int,
    ],
    "add_rms_norm": [*[c_void_p] * 3, c_float, c_void_p, c_int, c_int],
    "silu_mul": [c_void_p, c_void_p, c_int, c_int],
    "rotate_and_store": [*[c_void_p] * 8, c_int],
    "int8_product": [*[c_void_p] * 4, *[c_int] * 3],
}


def _function(name: str) -> Any:
    kind, _, _ = name.rpartition("_")
    letting_go, keeping = loaded()
    function = getattr(letting_go if kind in ("attend", "int8_product") else keeping, name)
    function.argtypes = ARGUMENTS[kind]
    function.restype = None
    return function
