"""Attention over the blocks with torch's own operations: right on every device, and what others are tested
against.

Rows that are alike in how many there are of a sequence, and in how much they see, are attended together:
their blocks are gathered into one dense batch, with a mask over what lies beyond each row. Sizes are alike if
they agree up to a factor of two, so a long sequence doesn't make short ones pay.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llmboost_worker.engine.transformers.attention.backend import Formula, StaticBackend
from llmboost_worker.engine.transformers.attention.layout import StepLayout

QUERY_BLOCK = 256
"""Rows of a chunk that are attended at a time where a mask is needed: bounds the mask, and a piece skips the
keys after its end."""

CAUSAL = 64
"""Rows from which on the beginning of a prompt is attended by itself, without a mask. Shorter ones go
together."""

MIN_BLOCKS = 8
"""Blocks up to which all contexts count as alike."""

MOST_BLOCKS = 4096
"""Gathered at a time; bounds the memory that a step needs beside the cache."""

MOST_SCORES = 1 << 22
"""Elements of one mask."""


class TorchBackend(StaticBackend):
    most_blocks = MOST_BLOCKS

    def write(
        self, layer_keys: Tensor, layer_values: Tensor, key: Tensor, value: Tensor, layout: StepLayout
    ) -> None:
        layer_keys.flatten(0, 1).index_copy_(0, layout.slots, key)
        layer_values.flatten(0, 1).index_copy_(0, layout.slots, value)

    def attend(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        window, block_size = formula.window, layer_keys.shape[1]
        if window not in layout.plans:
            pieces = _Pieces.of(layout, window, block_size)
            layout.plans[window] = [
                _group(pieces.take(index), layout, window, block_size, query)
                for index in pieces.alike(block_size)
            ]
        out = query.new_empty(*query.shape[:2], layer_values.shape[3])
        for group in layout.plans[window]:
            group.attend(layer_keys, layer_values, query, out, formula)
        return out

    def decode(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, layout: StepLayout, formula: Formula
    ) -> Tensor:
        rows, heads, _ = query.shape
        keys, values = (
            tensor.index_select(0, layout.block_tables.flatten())
            .view(rows, -1, *tensor.shape[2:])
            .transpose(1, 2)
            for tensor in (layer_keys, layer_values)
        )
        plan = (TorchBackend.decode, formula.window)
        if plan not in layout.plans:
            key = torch.arange(keys.shape[2], device=query.device)
            hidden = key >= layout.lengths[:, None]
            if formula.window is not None:
                hidden |= key < layout.lengths[:, None] - formula.window
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            layout.plans[plan] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        packed = query.reshape(rows, keys.shape[1], heads // keys.shape[1], -1)
        return attend(packed, keys, values, layout.plans[plan], formula).reshape(rows, heads, -1)


@dataclass(slots=True)
class _Pieces:
    """Runs of rows, each of one sequence. Arrays [pieces]."""

    sequence: NDArray[np.int64]
    row: NDArray[np.int64]
    """The first row in the step."""
    position: NDArray[np.int64]
    """Of that row in its sequence."""
    size: NDArray[np.int64]
    """Rows."""
    causal: NDArray[np.bool_]
    """These rows are all that there is to see."""
    first_block: NDArray[np.int64]
    """Of those that any row sees."""
    num_blocks: NDArray[np.int64]

    @classmethod
    def of(cls, layout: StepLayout, window: int | None, block_size: int) -> "_Pieces":
        single = layout.num_single
        first_rows = np.cumsum(layout.rows) - layout.rows
        pieces = [(i, i, int(layout.ends[i]) - 1, 1, False) for i in range(single)]
        for i in range(single, len(layout.rows)):
            row, rows, end = int(first_rows[i]), int(layout.rows[i]), int(layout.ends[i])
            if rows == end and rows >= CAUSAL and not (window and window < end):
                pieces.append((i, row, 0, rows, True))
                continue
            for first, last in pairwise([*range(0, rows, QUERY_BLOCK), rows]):
                pieces.append((i, row + first, end - rows + first, last - first, False))
        sequence, row_of, position, size, causal = np.array(pieces, dtype=np.int64).T
        first_block = np.maximum(0, position + 1 - window) // block_size if window else np.zeros_like(size)
        num_blocks = -(-(position + size) // block_size) - first_block
        return cls(sequence, row_of, position, size, causal.astype(bool), first_block, num_blocks)

    def take(self, index: NDArray[np.int64]) -> "_Pieces":
        return _Pieces(*(getattr(self, name)[index] for name in self.__slots__))

    def alike(self, block_size: int) -> list[NDArray[np.int64]]:
        """Indices of the pieces that go together; those of causal ones alone."""
        kinds = np.stack([_power(self.size), _power(np.maximum(self.num_blocks, MIN_BLOCKS)), self.causal])
        groups = []
        for kind in np.unique(kinds, axis=1).T:
            index = np.flatnonzero((kinds == kind[:, None]).all(0))
            blocks = int(self.num_blocks[index].max())
            scores = blocks * block_size * int(self.size[index].max())
            most = max(1, min(MOST_BLOCKS // blocks, MOST_SCORES // scores))
            most = 1 if kind[2] else most
            groups += [index[first : first + most] for first in range(0, len(index), most)]
        return groups


def _power(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The next power of two."""
    return np.ceil(np.log2(sizes)).astype(np.int64)


@dataclass(slots=True)
class _Group:
    """n pieces, padded to q rows each over the same number of keys."""

    shape: tuple[int, int]
    """n, q"""
    rows: slice | Tensor
    """[n * q] of the step; padding repeats a piece's last row."""
    blocks: Tensor
    """[n * blocks of each]"""
    num_keys: int
    mask: Tensor | None
    """[n, 1, q, keys], to add to the scores."""
    is_causal: bool

    def attend(
        self, layer_keys: Tensor, layer_values: Tensor, query: Tensor, out: Tensor, how: Formula
    ) -> None:
        keys, values = self._gather(layer_keys), self._gather(layer_values)
        (count, size), heads, key_heads = self.shape, query.shape[1], keys.shape[1]
        mine = query[self.rows]
        if size == 1:
            # The query heads that share a key head become rows of one product.
            packed = mine.reshape(count, key_heads, heads // key_heads, -1)
            result = attend(packed, keys, values, self.mask, how).reshape(count, heads, -1)
        else:
            spread = mine.view(count, size, heads, -1).transpose(1, 2)
            result = (
                attend(spread, keys, values, self.mask, how, self.is_causal).transpose(1, 2).flatten(0, 1)
            )
        if isinstance(self.rows, slice):
            out[self.rows] = result
        else:
            out.index_copy_(0, self.rows, result)

    def _gather(self, tensor: Tensor) -> Tensor:
        """[n, key_heads, keys, dim]"""
        dense = tensor.index_select(0, self.blocks).view(self.shape[0], -1, *tensor.shape[2:])
        return dense[:, : self.num_keys].transpose(1, 2)


def _group(pieces: _Pieces, layout: StepLayout, window: int | None, block_size: int, query: Tensor) -> _Group:
    count, size, num_blocks = len(pieces.size), int(pieces.size.max()), int(pieces.num_blocks.max())
    columns = np.minimum(pieces.first_block[:, None] + np.arange(num_blocks), layout.tables.shape[1] - 1)
    blocks = layout.tables[pieces.sequence[:, None], columns]
    offsets = np.minimum(np.arange(size), pieces.size[:, None] - 1)
    rows = (pieces.row[:, None] + offsets).ravel()
    first_key = pieces.first_block * block_size
    num_keys = int((pieces.position + pieces.size - first_key).max())
    mask = None
    if not pieces.causal[0]:
        keys = (first_key[:, None] + np.arange(num_keys))[:, None, :]
        positions = (pieces.position[:, None] + offsets)[:, :, None]
        hidden = keys > positions
        if window:
            hidden |= keys <= positions - window
        if hidden.any():
            mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            mask.masked_fill_(torch.from_numpy(hidden).to(query.device), -torch.inf).unsqueeze_(1)
    contiguous = bool((np.diff(rows) == 1).all())
    return _Group(
        shape=(count, size),
        rows=slice(int(rows[0]), int(rows[-1]) + 1)
        if contiguous
        else torch.from_numpy(rows).to(query.device),
        blocks=torch.from_numpy(blocks.ravel()).to(query.device),
        num_keys=num_keys,
        mask=mask,
        is_causal=bool(pieces.causal[0]),
    )


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, how: Formula, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention of [batch, heads, rows, dim] over [batch, key_heads, keys, dim]; the mask
    is added to the scores."""
    grouped = query.shape[1] != keys.shape[1]
    if how.softcap is None and how.sinks is None:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=is_causal, scale=how.scale, enable_gqa=grouped
        )
    # No fused kernel caps scores or has sinks. As in transformers' eager attention of Gemma 2 and gpt-oss.
    if grouped:
        repeats = query.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    if how.sinks is not None:
        # By head, or by key head and, as rows, the heads that share it.
        sinks = how.sinks.to(scores.dtype).view(1, query.shape[1], -1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32)[..., : keys.shape[2]].to(query.dtype)
    return torch.matmul(weights, values)
