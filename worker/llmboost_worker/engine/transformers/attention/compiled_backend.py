"""Attention over the blocks by compiled kernels, on a CPU: keys and values are read where they lie."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmboost_worker.engine.transformers.attention.backend import AttentionBackend, Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend
from llmboost_worker.engine.transformers.cache import LayerShape
from llmboost_worker.engine.transformers.kernels import MAX_QUERIES, PART, Attention, Kernels, tiles
from llmboost_worker.engine.transformers.kernels.tiles import Chunks

SHORT = 16
"""Rows of a chunk up to which the kernel for rows is the faster one. For longer ones it pays to gather their
context for a product of matrices, which torch does better."""

SHORT_ON_AMX = 3
"""The same beside a kernel that reads the context where it lies."""

MOST_ROWS = 16
"""Of a chunk that read the context together."""


class CompiledBackend(AttentionBackend):
    """A kernel for decoding rows and short chunks, another for long ones if there is AMX, torch otherwise."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._torch = TorchBackend()
        self._formulas: dict[tuple[Any, ...], Attention] = {}
        self._scratch = torch.empty(0)
        self._chunks = Chunks() if tiles.usable() else None
        # A row's context is shared out only where rows and heads don't keep the threads busy by themselves.
        self._few = 4 * torch.get_num_threads()

    @staticmethod
    def fits(layers: list[LayerShape], num_heads: int) -> bool:
        """Whether the kernel can attend in all layers."""
        return all(
            Kernels.attends(num_heads, layer.heads, layer.key_dim, layer.value_dim) for layer in layers
        )

    def write(
        self, layer_keys: Tensor, layer_values: Tensor, key: Tensor, value: Tensor, layout: StepLayout
    ) -> None:
        self._torch.write(layer_keys, layer_values, key, value, layout)

    def attend(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        if formula.sinks is not None:
            return self._torch.attend(layer_keys, layer_values, query, layout, formula)
        rows = min(MOST_ROWS, MAX_QUERIES * layer_keys.shape[2] // query.shape[1])
        chunks = self._chunks if self._chunks and self._chunks.fit(query, layer_values) else None
        short = SHORT_ON_AMX if chunks else SHORT
        plan: _Plan | None = layout.plans.get((CompiledBackend, rows, short))
        if plan is None:
            plan = layout.plans[CompiledBackend, rows, short] = _Plan.of(layout, rows, short)
        out = query.new_empty(len(query), query.shape[1], layer_values.shape[3])
        if query.stride(2) != 1 or query.stride(1) != query.shape[2]:
            query = query.contiguous()
        if len(plan.owners):
            self._attend(layer_keys, layer_values, query, layout, plan, formula, out)
        if plan.rest is not None:
            rest, rest_out = query[plan.num_rows :], out[plan.num_rows :]
            if chunks:
                chunks.attend(
                    self._how(query.shape[1], layer_keys, layer_values.shape[3], formula),
                    rest,
                    layer_keys,
                    layer_values,
                    plan.rest.block_tables,
                    plan.rest.query_starts,
                    plan.rest.positions,
                    rest_out,
                    plan.rest_context,
                )
            else:
                rest_out.copy_(self._torch.attend(layer_keys, layer_values, rest, plan.rest, formula))
        return out

    def _attend(
        self,
        layer_keys: Tensor,
        layer_values: Tensor,
        query: Tensor,
        layout: StepLayout,
        plan: "_Plan",
        formula: Formula,
        out: Tensor,
    ) -> None:
        heads, key_heads, value_dim = query.shape[1], layer_keys.shape[2], layer_values.shape[3]
        how = self._how(heads, layer_keys, value_dim, formula)
        size = plan.most_rows * heads // key_heads * (value_dim + 2)
        scratch, items = None, len(plan.owners) * key_heads
        if items < self._few and plan.most_parts > 1:
            if len(self._scratch) < items * plan.most_parts * size:
                self._scratch = torch.empty(2 * items * plan.most_parts * size)
            scratch = self._scratch
        self._kernels.attend(
            how,
            query,
            layer_keys,
            layer_values,
            layout.block_tables,
            plan.owners,
            plan.starts,
            layout.positions,
            out,
            scratch,
            plan.most_parts,
            size,
        )

    def _how(self, heads: int, layer_keys: Tensor, value_dim: int, formula: Formula) -> Attention:
        _, block_size, key_heads, key_dim = layer_keys.shape
        key = (heads, key_heads, key_dim, value_dim, block_size, formula)
        how = self._formulas.get(key)
        if how is None:
            how = self._formulas[key] = Attention(
                heads,
                key_heads,
                key_dim,
                value_dim,
                block_size,
                formula.scale,
                formula.softcap or 0.0,
                formula.window or 0,
            )
        return how


@dataclass(slots=True)
class _Plan:
    """Which rows the kernel attends for, the first ones, and in which groups."""

    num_rows: int
    owners: Tensor
    """[groups], int32: the sequence of each."""
    starts: Tensor
    """[groups + 1], int32: the first row of each, and the end."""
    most_rows: int
    """Of a group."""
    most_parts: int
    """Of a context, as the kernel divides it."""
    rest: StepLayout | None
    """Of the sequences whose chunks are long."""
    rest_context: int
    """Tokens of all of these."""

    @classmethod
    def of(cls, layout: StepLayout, rows: int, most: int) -> "_Plan":
        """`rows`: of a group at most; `most`: of a chunk that counts as short."""
        short = int((layout.rows <= most).argmin()) if (layout.rows > most).any() else len(layout.rows)
        sizes = layout.rows[:short]
        groups = -(-sizes // rows)
        owners = np.repeat(np.arange(short, dtype=np.int32), groups)
        within = np.arange(len(owners)) - np.repeat(np.cumsum(groups) - groups, groups)
        starts = np.append(np.repeat(np.cumsum(sizes) - sizes, groups) + within * rows, sizes.sum())
        return cls(
            num_rows=int(sizes.sum()),
            owners=torch.from_numpy(owners),
            starts=torch.from_numpy(starts.astype(np.int32)),
            most_rows=int(min(sizes.max(initial=0), rows)),
            most_parts=-(-int(layout.ends[:short].max(initial=0)) // PART),
            rest=layout.tail(short) if short < len(layout.rows) else None,
            rest_context=int(layout.ends[short:].sum()),
        )
