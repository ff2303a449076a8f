"""Names that repeat are found, however far apart they are."""

from llmboost_api.batches.uniqueness import CHUNK, Uniqueness


async def test_repetitions_are_found_across_chunks() -> None:
    """Each is told once, with the place of the first: in the same chunk, in a later one, in the last."""
    names = [f"name-{number}" for number in range(3 * CHUNK)]
    names[5] = names[2]
    names[2 * CHUNK + 7] = names[11]
    names[-1] = names[2]
    found = []
    with Uniqueness() as uniqueness:
        for number, name in enumerate(names[:-1]):
            found += await uniqueness.add(name, number)
        assert found == [(5, 2), (2 * CHUNK + 7, 11)][: len(found)]
        found += await uniqueness.add(names[-1], len(names) - 1)
        found += await uniqueness.flush()
    assert found == [(5, 2), (2 * CHUNK + 7, 11), (len(names) - 1, 2)]


async def test_names_that_do_not_repeat() -> None:
    """There is nothing to tell, of none or of many."""
    with Uniqueness() as uniqueness:
        assert await uniqueness.flush() == []
        for number in range(CHUNK + 1):
            assert await uniqueness.add(str(number), number) == []
        assert await uniqueness.flush() == []
