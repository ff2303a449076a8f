"""Whose blocks are whose: nothing is lost, nothing has two owners that don't share it, and what was computed
is found again."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmboost_worker.engine.transformers.blocks import NOBODYS, BlockManager, BlockTable, CacheFull

SIZE = 4
BLOCKS = 12

operation = st.one_of(
    st.tuples(st.just("allocate"), st.lists(st.integers(0, 1), min_size=1, max_size=20), st.booleans()),
    st.tuples(st.just("compute"), st.integers(0, 9), st.integers(1, 9)),
    st.tuples(st.just("append"), st.integers(0, 9), st.integers(0, 1)),
    st.tuples(st.just("free"), st.integers(0, 9)),
)


class Sequence:
    """Some tokens with their blocks. What a block holds is written down as the tokens up to its end."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.table = BlockTable()
        self.num_computed = 0


class Model:
    """What a cache must look like, kept beside the manager: contents by block, as sequences write them."""

    def __init__(self, enable_prefix_caching: bool = True, num_blocks: int = BLOCKS) -> None:
        self.manager = BlockManager(1 + num_blocks, SIZE, enable_prefix_caching)
        self.contents: dict[int, tuple[int, ...]] = {}
        self.sequences: list[Sequence] = []

    def allocate(self, tokens: list[int], reuse: bool = True) -> Sequence:
        sequence = Sequence(list(tokens))
        free = self.manager.num_free
        try:
            sequence.num_computed = self.manager.allocate(sequence.table, sequence.tokens, reuse=reuse)
        except CacheFull:
            assert not sequence.table.blocks
            assert self.manager.num_free == free
            raise
        for index in range(sequence.num_computed // SIZE):
            expected = tuple(tokens[: (index + 1) * SIZE])
            assert self.contents[sequence.table.blocks[index]] == expected, "found what isn't its beginning"
        self.sequences.append(sequence)
        return sequence

    def compute(self, sequence: Sequence, tokens: int) -> None:
        end = min(len(sequence.tokens), sequence.num_computed + tokens)
        for position in range(sequence.num_computed, end):
            self.contents[sequence.table.blocks[position // SIZE]] = tuple(sequence.tokens[: position + 1])
        sequence.num_computed = end
        self.manager.register(sequence.table, sequence.tokens, end)

    def append(self, sequence: Sequence, token: int) -> None:
        self.manager.extend(sequence.table, len(sequence.tokens) + 1)
        sequence.tokens.append(token)

    def free(self, sequence: Sequence) -> None:
        self.manager.free(sequence.table)
        self.sequences.remove(sequence)

    def whole(self, tokens: list[int]) -> Sequence:
        """A sequence that has been computed."""
        sequence = self.allocate(tokens)
        self.compute(sequence, len(tokens))
        return sequence

    def check(self) -> None:
        owners = Counter(block for sequence in self.sequences for block in sequence.table.blocks)
        assert NOBODYS not in owners
        assert self.manager.num_used == len(owners)
        assert self.manager.num_used + self.manager.num_free == self.manager.num_blocks
        for sequence in self.sequences:
            assert len(sequence.table.blocks) == -(-len(sequence.tokens) // SIZE)
            for index, block in enumerate(sequence.table.blocks):
                end = min((index + 1) * SIZE, sequence.num_computed)
                if end > index * SIZE:
                    assert self.contents[block] == tuple(sequence.tokens[:end]), "overwritten by another"
                if end < (index + 1) * SIZE:
                    assert owners[block] == 1, "a block that is still written to is shared"


@settings(max_examples=200, deadline=None)
@given(st.lists(operation, max_size=60), st.booleans())
def test_any_history_leaves_each_sequence_with_its_own_tokens(operations: list[tuple], enabled: bool) -> None:
    """Blocks are shared only once they are full and hold the same beginning; a refusal changes nothing; in
    the end all are free."""
    model = Model(enabled)
    for name, *arguments in operations:
        try:
            if name == "allocate":
                model.allocate(*arguments)
            elif model.sequences:
                sequence = model.sequences[arguments[0] % len(model.sequences)]
                getattr(model, name)(sequence, *arguments[1:])
        except CacheFull:
            pass
        model.check()
    for sequence in list(model.sequences):
        model.free(sequence)
    assert model.manager.num_used == 0
    assert not model.manager._under_way
    model.whole([7] * BLOCKS * SIZE)
    model.check()


def test_the_last_token_is_never_found() -> None:
    """It must be computed, to know what follows."""
    model = Model()
    model.whole([1] * 8)
    assert model.allocate([1] * 8).num_computed == 4
    assert model.allocate([1] * 9).num_computed == 8


def test_what_a_sequence_wrote_is_found_too() -> None:
    """As by the next turn of a conversation; and by nobody who differs before it."""
    model = Model()
    first = model.whole([1, 2, 3, 4, 5])
    for token in (6, 7, 8, 9):
        model.append(first, token)
        model.compute(first, 1)
    model.free(first)
    assert model.allocate([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).num_computed == 8
    assert model.allocate([0, 2, 3, 4, 5, 6, 7, 8, 9, 10]).num_computed == 0


def test_of_what_nobody_uses_the_oldest_goes_first_and_ends_before_beginnings() -> None:
    model = Model(num_blocks=6)
    for token in (1, 2):
        model.free(model.whole([token] * 12))
    model.free(model.whole([1] * 12))  # used again, hence the younger
    for token, left in ((2, 2), (2, 1), (2, 0), (1, 2), (1, 1), (1, 0)):
        model.whole([token + 10 + left] * 4)
        assert len(model.manager.find(BlockTable(), [token] * 13)) == left
        assert len(model.manager.find(BlockTable(), [1] * 13)) == (3 if token == 2 else left)


def test_what_somebody_uses_stays() -> None:
    model = Model()
    model.free(model.whole([1] * 12))
    again = model.allocate([1] * 13)
    for number in range(8):
        model.whole([10 + number] * 4)
    with pytest.raises(CacheFull, match="1 blocks are needed, 0 are free"):
        model.allocate([2])
    assert again.num_computed == 12
    model.check()


def test_room_to_spare_is_asked_for_with_the_blocks_that_would_be_found() -> None:
    """Found blocks that nobody uses are free ones, too, until they are found."""
    model = Model(num_blocks=5)
    model.free(model.whole([1] * 12))
    with pytest.raises(CacheFull):
        model.manager.allocate(BlockTable(), [1] * 16, spare=2)
    assert model.manager.allocate(BlockTable(), [1] * 16, spare=1) == 12


def test_of_two_that_compute_the_same_one_copy_can_be_found() -> None:
    model = Model()
    first, second = model.allocate([1] * 9), model.allocate([1] * 9)
    for sequence in (first, second):
        model.compute(sequence, 9)
    model.check()
    free = model.manager.num_free
    model.free(second)
    assert model.manager.num_free == free + 3
    assert model.allocate([1] * 9).table.blocks[:2] == first.table.blocks[:2]
    for sequence in list(model.sequences):
        model.free(sequence)
    for number in range(2 * BLOCKS):
        model.free(model.whole([10 + number] * 4))
    model.check()


def test_one_that_must_compute_all_of_its_prompt_finds_nothing_and_is_found() -> None:
    model = Model()
    model.free(model.whole([1] * 9))
    sequence = model.allocate([1] * 9 + [2] * 4, reuse=False)
    assert sequence.num_computed == 0
    model.compute(sequence, 13)
    model.check()
    assert model.allocate([1] * 9 + [2] * 4).num_computed == 12


def test_who_computes_a_beginning_is_known_until_it_has_or_leaves() -> None:
    model = Model()
    first, waiting = model.allocate([1] * 12), BlockTable()
    assert model.manager.computed_by(waiting, [1] * 10) is first.table
    model.compute(first, 4)
    assert model.manager.computed_by(waiting, [1] * 10) is first.table
    assert model.manager.computed_by(BlockTable(), [1] * 5) is None
    assert model.manager.computed_by(BlockTable(), [1, 1, 1, 1, 2, 1, 1, 1, 1]) is None
    model.compute(first, 4)
    assert model.manager.computed_by(waiting, [1] * 9) is None
    assert model.manager.computed_by(BlockTable(), [1] * 13) is first.table
    model.free(first)
    assert model.manager.computed_by(BlockTable(), [1] * 13) is None


def test_blocks_that_others_may_read_are_told_from_those_that_none_does() -> None:
    """Of a sequence that has failed, what nobody can read is cleared."""
    model = Model()
    first = model.whole([1] * 9)
    second = model.allocate([1] * 8 + [2] * 8)
    assert model.manager.unregistered(second.table) == list(second.table.blocks[2:])
    assert model.manager.unregistered(first.table) == list(first.table.blocks[2:])


def test_without_a_prefix_cache_nothing_is_found_or_waited_for() -> None:
    model = Model(enable_prefix_caching=False)
    first = model.allocate([1] * 9)
    assert model.manager.computed_by(BlockTable(), [1] * 9) is None
    model.compute(first, 9)
    model.free(first)
    assert model.allocate([1] * 9).num_computed == 0
