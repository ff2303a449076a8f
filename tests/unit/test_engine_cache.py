"""Slots keep what was written into them, wherever they move, and hold nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmboost_worker.engine.transformers.cache import CacheFull, LayerShape, Slot, SlotCache, capacities

LAYERS = [LayerShape(heads=2, key_dim=3, value_dim=5), LayerShape(heads=1, key_dim=4, value_dim=4)]
PER_TOKEN = 4 * (2 * (3 + 5) + 1 * (4 + 4))
MAX_LEN = 700


def cache(max_tokens: int = 10_000) -> SlotCache:
    return SlotCache(LAYERS, MAX_LEN, 32, max_tokens * PER_TOKEN, torch.float32, torch.device("cpu"))


def write(slot: Slot, first: int, last: int, mark: float) -> None:
    for tensors in (slot.slab.keys, slot.slab.values):
        for tensor in tensors:
            tensor[slot.index, :, first:last] = mark


def contents(slot: Slot) -> set[tuple[float, ...]]:
    """Over layers, heads and dimensions, what each token holds: one element if all agree."""
    rows = set()
    for tensors in (slot.slab.keys, slot.slab.values):
        for tensor in tensors:
            rows |= {
                tuple(row) for row in tensor[slot.index].transpose(1, 2).reshape(-1, tensor.shape[2]).tolist()
            }
    return rows


operation = st.one_of(
    st.tuples(st.just("allocate"), st.integers(1, MAX_LEN)),
    st.tuples(st.just("extend"), st.integers(0, 31), st.integers(1, 300)),
    st.tuples(st.just("free"), st.integers(0, 31)),
    st.tuples(st.just("trim")),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(operation, max_size=40))
def test_any_history_leaves_each_slot_with_its_own_tokens_and_zeros(operations: list[tuple]) -> None:
    """Slots are given back full of NaN, and nobody else sees one. A refusal changes nothing. Memory stays
    within its bound."""
    slots, live, mark = cache(max_tokens=3000), {}, 0.0
    for name, *arguments in operations:
        try:
            if name == "allocate":
                mark += 1
                slot = slots.allocate(arguments[0])
                write(slot, 0, arguments[0], mark)
                live[mark] = (slot, arguments[0])
            elif name == "extend" and live:
                key = list(live)[arguments[0] % len(live)]
                slot, length = live[key]
                longer = min(length + arguments[1], MAX_LEN)
                slots.extend(slot, longer)
                write(slot, length, longer, key)
                live[key] = (slot, longer)
            elif name == "free" and live:
                key = list(live)[arguments[0] % len(live)]
                slot, _ = live.pop(key)
                write(slot, 0, slot.slab.capacity, torch.nan)
                slots.free(slot)
            elif name == "trim":
                slots.trim()
        except CacheFull:
            pass
        assert slots.bytes_reserved <= 3000 * PER_TOKEN
        assert slots.num_slots == len(live)
        for key, (slot, length) in live.items():
            assert slot.slab.live[slot.index] is slot
            tail = slot.slab.capacity - length
            assert contents(slot) == {(key,) * length + (0.0,) * tail}


def test_a_slot_is_at_most_twice_as_long_as_its_sequence() -> None:
    for length in range(128, MAX_LEN + 1):
        assert cache().allocate(length).slab.capacity <= 2 * length
    assert list(capacities(MAX_LEN)) == [128, 256, 512, 700]
    assert list(capacities(100)) == [100]


def test_a_full_cache_refuses_and_has_room_again() -> None:
    slots = cache(max_tokens=256)
    first, _ = slots.allocate(100), slots.allocate(100)
    with pytest.raises(CacheFull, match="at most"):
        slots.allocate(1)
    slots.free(first)
    slots.allocate(1)


def test_memory_of_empty_slots_serves_other_lengths() -> None:
    slots = cache(max_tokens=1024)
    for slot in [slots.allocate(100) for _ in range(8)]:
        slots.free(slot)
    slots.allocate(MAX_LEN)


def test_an_allocator_that_refuses_is_a_full_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = cache()
    slot = slots.allocate(100)
    write(slot, 0, 100, 7.0)

    def refuse(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", refuse)
        with pytest.raises(CacheFull, match="DefaultCPUAllocator"):
            slots.allocate(100)
        with pytest.raises(CacheFull, match="DefaultCPUAllocator"):
            slots.extend(slot, 300)
    assert slots.num_slots == 1
    slots.allocate(100)
    slots.extend(slot, 300)
    assert contents(slot) == {(7.0,) * 100 + (0.0,) * (slot.slab.capacity - 100)}


def test_trim_gives_everything_back() -> None:
    slots = cache()
    kept = slots.allocate(300)
    write(kept, 0, 300, 3.0)
    others = [slots.allocate(length) for length in (10, 290, 310, 600)]
    for slot in others:
        slots.free(slot)
    slots.trim()
    assert slots.bytes_reserved == 512 * PER_TOKEN
    assert contents(kept) == {(3.0,) * 300 + (0.0,) * 212}
    slots.free(kept)
    slots.trim()
    assert slots.bytes_reserved == 0
