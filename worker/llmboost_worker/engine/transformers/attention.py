"""Attention over the slots of many sequences, inside a model that thinks it sees one row of tokens.

A step packs its tokens into `input_ids [1, T]`: decode rows first (one token of a sequence each), prefill
chunks after them. Everything in a transformer but attention works token by token, so the model's own forward
runs unmodified, and its attention layers call `slot_attention` (registered through transformers'
`AttentionInterface`), which writes each token's key and value into the slot of its sequence and attends
there.

Registering no mask function under the same name keeps transformers from building T x T masks
(`masking_utils._preprocess_mask_arguments`); models then pass None and say `sliding_window` in a keyword.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llmboost_worker.engine.transformers.cache import LayerShape, Slab, Slot

NAME = "llmboost_slots"
"""As an attention implementation of transformers."""

UNSUPPORTED = ("s_aux", "position_bias", "alibi")
"""Keywords (sinks, biases) that change what attention computes, and that `slot_attention` doesn't know."""

QUERY_BLOCK = 256
"""Rows of a chunk that are attended at a time where a mask is needed: bounds the mask, and a block skips the
keys after its end (half of the work for a chunk over an empty slot)."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A layer's own parameters."""

    scale: float
    softcap: float | None
    window: int | None
    """A token sees this many tokens, itself included."""


class Segment(Protocol):
    """Rows of the step that belong together."""

    @property
    def num_rows(self) -> int: ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Formula) -> Tensor:
        """Takes [heads, rows, dim] of its rows, stores keys and values, returns [rows, heads, value_dim]."""


@dataclass(slots=True)
class DecodeRun:
    """Decode rows whose slots are neighbours in one slab: one batched product."""

    slab: Slab
    first: int
    lengths: list[int]
    """Per row, tokens to attend to, the row's own included."""
    _masks: dict[int | None, tuple[int, Tensor | None]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, how: Formula) -> Tensor:
        """query [heads, rows, dim] -> [rows, heads, value_dim]"""
        start, mask = self._mask(how.window, query)
        slots, end = slice(self.first, self.first + len(self.lengths)), max(self.lengths)
        keys = self.slab.keys[layer][slots, :, start:end]
        values = self.slab.values[layer][slots, :, start:end]
        heads, rows, dim = query.shape
        # The query heads that share a key head become rows of one product: no repeated keys.
        packed = query.transpose(0, 1).reshape(rows, keys.shape[1], heads // keys.shape[1], dim)
        return attend(packed, keys, values, mask, how).reshape(rows, heads, -1)

    def _mask(self, window: int | None, query: Tensor) -> tuple[int, Tensor | None]:
        """The first key that any row sees, and [rows, 1, 1, keys] to add to the scores."""
        if window not in self._masks:
            starts = [max(0, length - window) if window else 0 for length in self.lengths]
            start, end = min(starts), max(self.lengths)
            mask = None
            if start < max(starts) or min(self.lengths) < end:
                keys = torch.arange(start, end, device=query.device)
                first = torch.tensor(starts, device=query.device)[:, None]
                length = torch.tensor(self.lengths, device=query.device)[:, None]
                hidden = (keys < first) | (keys >= length)
                mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
                mask = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
            self._masks[window] = start, mask
        return self._masks[window]


@dataclass(slots=True)
class DecodeSegment:
    """The decode rows of one slab, in the order of their slots."""

    slab: Slab
    slots: Tensor
    """[rows]"""
    positions: Tensor
    """[rows]: where each row's token stands."""
    runs: list[DecodeRun]

    @classmethod
    def of(cls, slots: list[Slot], positions: list[int], device: torch.device) -> "DecodeSegment":
        """`slots` are of one slab, by index."""
        runs: list[DecodeRun] = []
        for slot, position in zip(slots, positions, strict=True):
            if not runs or slot.index != runs[-1].first + len(runs[-1].lengths):
                runs.append(DecodeRun(slot.slab, slot.index, []))
            runs[-1].lengths.append(position + 1)
        indices = torch.tensor([slot.index for slot in slots], device=device)
        return cls(slots[0].slab, indices, torch.tensor(positions, device=device), runs)

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Formula) -> Tensor:
        self.slab.keys[layer][self.slots, :, self.positions] = key.transpose(0, 1)
        self.slab.values[layer][self.slots, :, self.positions] = value.transpose(0, 1)
        if len(self.runs) == 1:
            return self.runs[0].attend(layer, query, how)
        parts = torch.split(query, [len(run.lengths) for run in self.runs], dim=1)
        return torch.cat([run.attend(layer, part, how) for run, part in zip(self.runs, parts, strict=True)])


@dataclass(slots=True)
class PrefillSegment:
    """A chunk of one sequence's prompt: tokens [start, start + num_rows)."""

    slot: Slot
    start: int
    num_rows: int
    _blocks: dict[int | None, list[tuple[slice, slice, Tensor]]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Formula) -> Tensor:
        slab, index, end = self.slot.slab, self.slot.index, self.start + self.num_rows
        slab.keys[layer][index, :, self.start : end] = key
        slab.values[layer][index, :, self.start : end] = value
        if self.start == 0 and not (how.window and how.window < end):
            out = attend(query[None], key[None], value[None], None, how, is_causal=True)
            return out[0].transpose(0, 1)
        keys, values = slab.keys[layer][index], slab.values[layer][index]
        parts = [
            attend(query[None, :, rows], keys[None, :, seen], values[None, :, seen], mask, how)
            for rows, seen, mask in self._masked_blocks(how.window, query)
        ]
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    def _masked_blocks(self, window: int | None, query: Tensor) -> list[tuple[slice, slice, Tensor]]:
        """Rows, the keys that any of them sees, and [rows, keys] to add to the scores."""
        if window not in self._blocks:
            blocks = []
            for first in range(0, self.num_rows, QUERY_BLOCK):
                rows = slice(first, min(first + QUERY_BLOCK, self.num_rows))
                seen = slice(max(0, self.start + first + 1 - window) if window else 0, self.start + rows.stop)
                row = torch.arange(self.start + rows.start, self.start + rows.stop, device=query.device)[
                    :, None
                ]
                column = torch.arange(seen.start, seen.stop, device=query.device)
                hidden = column > row
                if window:
                    hidden |= column <= row - window
                mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
                blocks.append((rows, seen, mask.masked_fill_(hidden, -torch.inf)))
            self._blocks[window] = blocks
        return self._blocks[window]


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, how: Formula, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of [batch, heads, rows, dim] over [batch, key_heads, keys, dim]; the mask
    is added to the scores."""
    grouped = query.shape[1] != keys.shape[1]
    if how.softcap is None:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=how.scale, enable_gqa=grouped
        )
    # No fused kernel caps scores. As in transformers' eager attention of Gemma 2.
    if grouped:
        repeats = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * how.scale
    scores = torch.tanh(scores / how.softcap) * how.softcap
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), values)


@dataclass(slots=True)
class LayerCall:
    """What a layer handed to its attention function."""

    layer: int
    shape: LayerShape
    window: int | None


class Probe:
    """Instead of segments, for a forward of one token: records what each layer passes."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []


class _Current(threading.local):
    """What the forward under way in this thread attends to. Not every model passes keywords on to its
    layers."""

    step: list[Segment] | Probe | None = None


_current = _Current()


@contextmanager
def attending(step: list[Segment] | Probe) -> Iterator[None]:
    """The forward inside attends to these segments, whose rows are the packed tokens in order."""
    _current.step = step
    try:
        yield
    finally:
        _current.step = None


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        query: [1, heads, T, key_dim]
        key: [1, key_heads, T, key_dim]
        value: [1, key_heads, T, value_dim]

    Returns:
        [1, T, heads, value_dim], and no weights.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name!r} in {type(module).__name__}")
    if attention_mask is not None:
        raise NotImplementedError(f"{type(module).__name__} builds an attention mask of its own")
    how = Formula(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window)
    step = _current.step
    if step is None:
        raise RuntimeError("slot attention outside of a step")
    if isinstance(step, Probe):
        shape = LayerShape(heads=key.shape[1], key_dim=key.shape[3], value_dim=value.shape[3])
        step.calls.append(LayerCall(layer, shape, sliding_window))
        return attend(query, key, value, None, how, is_causal=True).transpose(1, 2), None
    sizes = [segment.num_rows for segment in step]
    rows = zip(*(torch.split(tensor[0], sizes, dim=1) for tensor in (query, key, value)), strict=True)
    parts = [segment.attend(layer, q, k, v, how) for segment, (q, k, v) in zip(step, rows, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


AttentionInterface.register(NAME, slot_attention)
