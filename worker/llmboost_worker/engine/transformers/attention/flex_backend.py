"""Chunks of prompts by torch's flex_attention: on GPUs without the flash-attn package.

Keys and values of all chunks' sequences are gathered into one row, and who sees whom is said by a function of
two positions in it. Compiled, it makes nothing of the size of rows times keys, as a mask for SDPA is.
Decoding rows need no such mask, so those are the torch backend's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from llmboost_worker.engine.transformers.attention.backend import Formula
from llmboost_worker.engine.transformers.attention.layout import StepLayout
from llmboost_worker.engine.transformers.attention.torch_backend import TorchBackend


class FlexBackend(TorchBackend):
    def __init__(
        self,
        function: Callable[..., Any] = flex_attention,
        make_mask: Callable[..., BlockMask] = create_block_mask,
    ) -> None:
        """Uncompiled, both make all of rows times keys, and are for tests."""
        self._function, self._make_mask = function, make_mask

    @classmethod
    def compiled(cls) -> "FlexBackend":
        return cls(
            torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
        )

    def attend(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        single = layout.num_single
        if single == len(query):
            return super().attend(layer_keys, layer_values, query, layout, formula)
        out = query.new_empty(*query.shape[:2], layer_values.shape[3])
        plan: _Plan | None = layout.plans.get((FlexBackend, formula.window))
        if plan is None:
            plan = self._plan(layout, layer_keys.shape[1], formula.window)
            layout.plans[FlexBackend, formula.window] = plan
        if plan.head is not None:
            out[:single] = super().attend(layer_keys, layer_values, query[:single], plan.head, formula)
        keys, values = (
            tensor.flatten(0, 1).index_select(0, plan.slots).transpose(0, 1)[None]
            for tensor in (layer_keys, layer_values)
        )
        result = self._function(
            query[single:].transpose(0, 1)[None],
            keys,
            values,
            score_mod=_capped(formula.softcap),
            block_mask=plan.mask,
            scale=formula.scale,
            enable_gqa=True,
            return_aux=None if formula.sinks is None else AuxRequest(lse=True),
        )
        if formula.sinks is not None:
            result, sums = result[0], result[1].lse
            # A sink's score joins the sum that the weights were divided by.
            share = torch.sigmoid(sums - formula.sinks.float()[:, None])[..., None]
            result = result * share.to(result.dtype)
        out[single:] = result[0].transpose(0, 1)
        return out

    def _plan(self, layout: StepLayout, block_size: int, window: int | None) -> "_Plan":
        chunks, device = layout.tail(layout.num_single), layout.slots.device
        count = len(chunks.ends)
        owner = np.repeat(np.arange(count), chunks.ends)
        firsts = np.concatenate([[0], np.cumsum(chunks.ends)[:-1]])
        position = np.arange(len(owner)) - firsts[owner]
        slots = chunks.tables[owner, position // block_size].astype(np.int64) * block_size
        slots += position % block_size
        key_owner, key_position, row_owner = (
            torch.from_numpy(array).to(device)
            for array in (owner, position, np.repeat(np.arange(count), chunks.rows))
        )
        row_position = chunks.positions

        def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            mine = row_owner[row] == key_owner[key]
            seen = mine & (key_position[key] <= row_position[row])
            return seen if window is None else seen & (key_position[key] > row_position[row] - window)

        mask = self._make_mask(sees, None, None, len(chunks.slots), len(slots), device=device)
        head = layout.head(layout.num_single) if layout.num_single else None
        return _Plan(head, torch.from_numpy(slots).to(device), mask)


@dataclass(slots=True)
class _Plan:
    head: StepLayout | None
    """Of the decoding rows."""
    slots: Tensor
    """[keys]: where the contexts of all chunks lie, one after the other."""
    mask: BlockMask


@cache  # the same function for the same softcap, or it would be compiled anew in every step
def _capped(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def cap(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap
