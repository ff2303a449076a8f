"""The memory of keys and values: per layer, blocks of a few tokens each. `blocks` says whose they are.

Invariant: everything in it is finite. Attention over several sequences at once gives positions beyond a
sequence's end a weight of zero, and zero times NaN is NaN. So memory begins as zeros, and the blocks of a
sequence that failed are cleared before another gets them.
"""

import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token."""

    heads: int
    key_dim: int
    value_dim: int


def bytes_per_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in layers)


class KeyValueCache:
    """Keys and values of all blocks."""

    def __init__(
        self,
        layers: list[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """
        Raises:
            RuntimeError, OSError: there isn't as much memory.
        """
        self.num_blocks = num_blocks
        self.scratch = num_blocks
        """One more block, which no sequence is given: for rows that only pad a batch."""
        self.block_size = block_size
        self.keys = [
            _zeros((num_blocks + 1, block_size, layer.heads, layer.key_dim), dtype, device)
            for layer in layers
        ]
        """Per layer [blocks + 1, block_size, heads, key_dim]."""
        self.values = [
            _zeros((num_blocks + 1, block_size, layer.heads, layer.value_dim), dtype, device)
            for layer in layers
        ]
        """Per layer [blocks + 1, block_size, heads, value_dim]."""

    def clear(self, blocks: list[int]) -> None:
        """Zeroes these blocks."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.keys[0].device)
        for tensor in (*self.keys, *self.values):
            tensor.index_fill_(0, index, 0)

    def sound(self, slots: Tensor) -> Tensor:
        """Whether what the last layer has stored for each of the tokens in `slots` [tokens] is finite.

        What is not a number in one layer is none in all layers after it.

        Returns:
            [tokens], bool
        """
        last = [
            tensor[-1].flatten(0, 1).index_select(0, slots).flatten(1) for tensor in (self.keys, self.values)
        ]
        return last[0].isfinite().all(1) & last[1].isfinite().all(1)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU, memory that the kernel gives page by page, when it is first written: a cache may be much
    larger than what is ever used of it, and `torch.zeros` would write all of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
