"""Keys and values of live sequences: one slot each, in slabs of equal capacity.

A slab holds the slots of one capacity (128, 256, 512, ... tokens) and keeps its live slots at the front, so
the attention of all of them is one batched product over a plain strided view. A sequence that outgrows its
slot moves to the slab of twice the capacity, which costs one copy of each token over its life. So:

- a slot is never more than twice (and 127 tokens) as long as its sequence;
- sequences that are attended together differ in length by no more than that, so a long one doesn't make short
  ones pay;
- a slab's tensors grow and shrink with the number of sequences in it.

Invariant: what a slot holds beyond its sequence's tokens is finite. Batched attention gives those positions a
weight of zero, and zero times NaN, left by a sequence that failed, is NaN.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

MIN_CAPACITY = 128


class CacheFull(Exception):
    """No memory for another slot, or for a longer one."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer stores per token."""

    heads: int
    key_dim: int
    value_dim: int


def capacities(max_len: int) -> Iterator[int]:
    """Of the slabs, smallest first."""
    capacity = MIN_CAPACITY
    while capacity < max_len:
        yield capacity
        capacity *= 2
    yield max_len


def bytes_per_token(layers: list[LayerShape], dtype: torch.dtype) -> int:
    return dtype.itemsize * sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in layers)


class Slot:
    """Where one sequence's keys and values are. The cache moves it; its owner only holds it."""

    __slots__ = ("index", "length", "slab")

    def __init__(self, slab: "Slab", index: int, length: int) -> None:
        self.slab = slab
        self.index = index
        self.length = length
        """Tokens that it must keep when it moves."""


class Slab:
    """Slots of one capacity; the live ones are [0, len(live))."""

    def __init__(
        self, layers: list[LayerShape], capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self.live: list[Slot] = []
        self.num_slots = 0
        self.keys = [
            torch.empty(0, layer.heads, capacity, layer.key_dim, dtype=dtype, device=device)
            for layer in layers
        ]
        """Per layer [slots, heads, capacity, key_dim]."""
        self.values = [
            torch.empty(0, layer.heads, capacity, layer.value_dim, dtype=dtype, device=device)
            for layer in layers
        ]
        """Per layer [slots, heads, capacity, value_dim]."""

    def resize(self, num_slots: int) -> None:
        """Reallocates for `num_slots`, layer by layer: the copy needs room for one layer, not for all."""
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                tensors[i] = old.new_empty(num_slots, *old.shape[1:])
                tensors[i][: len(self.live)] = old[: len(self.live)]
        self.num_slots = num_slots

    def copy(self, source: "Slab", source_index: int, index: int, length: int) -> None:
        """Copies the first `length` tokens of a slot of `source` into the slot at `index`."""
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for target, origin in zip(mine, theirs, strict=True):
                target[index, :, :length] = origin[source_index, :, :length]

    def clear(self, index: int, length: int) -> None:
        """Zeroes a slot from token `length` on."""
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[index, :, length:] = 0


class SlotCache:
    """All slabs, under one bound of memory."""

    def __init__(
        self,
        layers: list[LayerShape],
        max_len: int,
        max_slots: int,
        max_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._layers = layers
        self._max_len = max_len
        self._max_slots = max_slots
        self._max_bytes = max_bytes
        self._dtype = dtype
        self._device = device
        self._slabs: dict[int, Slab] = {}
        self._bytes_per_token = bytes_per_token(layers, dtype)

    @property
    def num_slots(self) -> int:
        """Live ones."""
        return sum(len(slab.live) for slab in self._slabs.values())

    @property
    def bytes_reserved(self) -> int:
        return sum(slab.num_slots * self._slot_bytes(slab.capacity) for slab in self._slabs.values())

    def allocate(self, length: int) -> Slot:
        """A slot with room for `length` tokens, all of which are written before the slot is read as one of a
        batch.

        Raises:
            CacheFull: the bound is reached, or the machine has no more memory.
        """
        slab = self._slab(length)
        slot = Slot(slab, len(slab.live), length)
        slab.clear(slot.index, length)
        slab.live.append(slot)
        return slot

    def extend(self, slot: Slot, length: int) -> None:
        """Makes room for `length` tokens; the first `slot.length` are kept.

        Raises:
            CacheFull: as `allocate`; the slot is as it was.
        """
        if length > slot.slab.capacity:
            bigger = self._slab(length)
            index = len(bigger.live)
            bigger.copy(slot.slab, slot.index, index, slot.length)
            bigger.clear(index, slot.length)
            self._vacate(slot)
            slot.slab, slot.index = bigger, index
            bigger.live.append(slot)
        slot.length = length

    def free(self, slot: Slot) -> None:
        """The slot is not to be used again."""
        self._vacate(slot)

    def trim(self) -> None:
        """Gives back what no sequence uses."""
        for slab in list(self._slabs.values()):
            if not slab.live:
                del self._slabs[slab.capacity]
            elif slab.num_slots > len(slab.live):
                slab.resize(len(slab.live))

    def _slab(self, length: int) -> Slab:
        """The slab for that length, with at least one slot not in use."""
        capacity = next(c for c in capacities(self._max_len) if c >= length)
        slab = self._slabs.get(capacity)
        if slab is None:
            slab = self._slabs[capacity] = Slab(self._layers, capacity, self._dtype, self._device)
        live = len(slab.live)
        if live < slab.num_slots:
            return slab
        doubled = min(max(1, 2 * live), self._max_slots)
        if not self._fits(slab, doubled):
            self.trim()
            self._slabs[capacity] = slab
            doubled = live + 1
        if not self._fits(slab, doubled):
            raise CacheFull(
                f"{self.bytes_reserved} bytes of keys and values in use, at most {self._max_bytes}"
            )
        try:
            slab.resize(doubled)
        except (RuntimeError, MemoryError) as error:  # torch has no common class for its allocators' refusals
            raise CacheFull(f"no memory for {doubled} slots of {capacity} tokens: {error}") from error
        return slab

    def _fits(self, slab: Slab, num_slots: int) -> bool:
        more = (num_slots - slab.num_slots) * self._slot_bytes(slab.capacity)
        return self.bytes_reserved + more <= self._max_bytes

    def _slot_bytes(self, capacity: int) -> int:
        return capacity * self._bytes_per_token

    def _vacate(self, slot: Slot) -> None:
        """Closes the gap that the slot leaves with the slab's last one."""
        last = slot.slab.live.pop()
        if last is not slot:
            slot.slab.copy(slot.slab, last.index, slot.index, last.length)
            slot.slab.clear(slot.index, last.length)
            last.index = slot.index
            slot.slab.live[slot.index] = last
