"""Attention over the blocks by the flash-attn package (flash_attention_2): on GPUs, in half precision."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llmboost_worker.engine.transformers.attention.backend import Formula, StaticBackend
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend


class FlashAttention(Protocol):
    """What is used of the package: https://github.com/Dao-AILab/flash-attention, flash_attn_interface.py."""

    def flash_attn_with_kvcache(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> Tensor:
        """q [S, 1, heads, dim], caches [blocks, block_size, key_heads, dim] -> [S, 1, heads, dim]"""

    def flash_attn_varlen_func(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """q [T, heads, dim], caches as above -> [T, heads, dim]"""


class FlashBackend(StaticBackend):
    """Decoding rows by one function and chunks by another; both read the blocks where they lie."""

    block_size = 256
    """The package's condition: a multiple of 256."""
    most_blocks = None

    def __init__(self, flash: FlashAttention) -> None:
        self._flash = flash
        self._torch = TorchBackend()

    def write(
        self, layer_keys: Tensor, layer_values: Tensor, key: Tensor, value: Tensor, layout: StepLayout
    ) -> None:
        self._torch.write(layer_keys, layer_values, key, value, layout)

    def attend(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        if formula.sinks is not None:  # the package has none
            return self._torch.attend(layer_keys, layer_values, query, layout, formula)
        single = layout.num_single
        if single == len(query):
            return self.decode(layer_keys, layer_values, query, layout, formula)
        chunks = layout.plans.get(FlashBackend)
        if chunks is None:
            chunks = layout.plans[FlashBackend] = _Chunks.of(layout.tail(single))
        out = query.new_empty(*query.shape[:2], layer_values.shape[3])
        if single:
            out[:single] = self._decode(
                layer_keys, layer_values, query[:single], layout.lengths, layout.block_tables, formula
            )
        out[single:] = self._flash.flash_attn_varlen_func(
            query[single:],
            layer_keys,
            layer_values,
            cu_seqlens_q=chunks.query_starts,
            cu_seqlens_k=chunks.key_starts,
            max_seqlen_q=chunks.most_rows,
            max_seqlen_k=chunks.longest,
            block_table=chunks.block_tables,
            **_options(formula),
        )
        return out

    def decode(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        if formula.sinks is not None:
            return self._torch.decode(layer_keys, layer_values, query, layout, formula)
        return self._decode(layer_keys, layer_values, query, layout.lengths, layout.block_tables, formula)

    def _decode(
        self,
        layer_keys: Tensor,
        layer_values: Tensor,
        query: Tensor,
        lengths: Tensor,
        block_tables: Tensor,
        formula: Formula,
    ) -> Tensor:
        """One row each of the first sequences."""
        rows = len(query)
        return self._flash.flash_attn_with_kvcache(
            query[:, None],
            layer_keys,
            layer_values,
            cache_seqlens=lengths[:rows],
            block_table=block_tables[:rows],
            **_options(formula),
        )[:, 0]


@dataclass(slots=True)
class _Chunks:
    """Of the sequences after the decoding ones."""

    query_starts: Tensor
    """[sequences + 1], int32"""
    key_starts: Tensor
    """[sequences + 1], int32: sums of the contexts' lengths."""
    block_tables: Tensor
    most_rows: int
    longest: int

    @classmethod
    def of(cls, layout: StepLayout) -> "_Chunks":
        sums = np.concatenate([[0], np.cumsum(layout.ends)]).astype(np.int32)
        return cls(
            layout.query_starts,
            torch.from_numpy(sums).to(layout.slots.device),
            layout.block_tables,
            int(layout.rows.max()),
            int(layout.ends.max()),
        )


def _options(formula: Formula) -> dict[str, Any]:
    # The window's left side doesn't count the token itself.
    window = (-1, -1) if formula.window is None else (formula.window - 1, 0)
    return {
        "softmax_scale": formula.scale,
        "causal": True,
        "window_size": window,
        "softcap": formula.softcap or 0.0,
    }
