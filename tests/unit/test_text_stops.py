"""Stop strings: where the text ends, and that no part of what ends it is shown."""

import itertools
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmboost_worker.text import StopStrings

# Few letters, so that stop strings occur, overlap and almost occur.
LETTERS = "ab你😀"
TEXTS = st.text(LETTERS, max_size=30)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4).map(tuple)


def chunks_of(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(edges)]


def watch(stops: StopStrings, chunks: list[str]) -> tuple[str, bool]:
    visible = "".join([stops.push(chunk)[0] for chunk in chunks])
    return visible + stops.flush(), stops.stopped


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int] | None:
    """Start and end of the stop: the earliest end, then the earliest start."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (min(found)[1], min(found)[0]) if found else None


@settings(deadline=None)
@given(TEXTS, STOPS, st.booleans(), st.lists(st.integers(0, 30)))
@example("aab", ("aab", "ab", "b"), False, [1, 2])
@example("abab你", ("abab😀", "bab"), False, [])
def test_stops_are_found_wherever_the_chunks_are_cut(
    text: str, stops: tuple[str, ...], include: bool, cuts: list[int]
) -> None:
    """What is visible is the text up to the first stop, or all of it, however it came in chunks."""
    stop = first_stop(text, stops)
    expected = text if stop is None else text[: stop[1] if include else stop[0]]
    assert watch(StopStrings(stops, include), chunks_of(text, cuts)) == (expected, stop is not None)


@settings(deadline=None)
@given(TEXTS, STOPS)
def test_only_what_may_become_a_stop_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    """After each character, what is hidden is the longest end of the text that begins a stop string."""
    watched = StopStrings(stops)
    visible = ""
    for read in range(1, len(text) + 1):
        shown, stopped = watched.push(text[read - 1])
        visible += shown
        if stopped:
            return
        ends = [text[read - size : read] for size in range(read + 1)]
        held = max((end for end in ends if any(stop.startswith(end) for stop in stops)), key=len, default="")
        assert visible + held == text[:read]


@settings(deadline=None)
@given(TEXTS, STOPS, st.lists(st.booleans(), min_size=30, max_size=30))
def test_a_stop_counts_if_its_last_character_is_active(
    text: str, stops: tuple[str, ...], active: list[bool]
) -> None:
    """Stops that are complete before `min_tokens` are ordinary text; those that only begin there are
    stops."""
    watched = StopStrings(stops)
    visible = "".join([watched.push(char, active[n])[0] for n, char in enumerate(text)]) + watched.flush()
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and active[end - 1]:
            assert (visible, watched.stopped) == (text[: end - max(map(len, found))], True)
            return
    assert (visible, watched.stopped) == (text, False)


def test_nothing_is_visible_after_a_stop() -> None:
    """A stopped text stays stopped, also in the chunk that stopped it and at the flush."""
    stops = StopStrings(("END",))
    assert stops.push("one END two END") == ("one ", True)
    assert stops.push("three") == ("", True)
    assert stops.flush() == ""


def test_an_included_stop_holds_nothing_back() -> None:
    """What will be visible either way is visible at once."""
    stops = StopStrings(("\n\n",), include_stop=True)
    assert stops.push("a\n") == ("a\n", False)
    assert stops.push("\nb") == ("\n", True)


@pytest.mark.parametrize("stops", [(), ("",), ("", "")])
def test_no_stop_string_holds_nothing_back(stops: tuple[str, ...]) -> None:
    """Without stop strings, or with empty ones, text passes."""
    assert StopStrings(stops).push("anything") == ("anything", False)


def test_many_and_long_stops_cost_the_same_a_character() -> None:
    """A thousand stop strings and a text that always almost stops: the cost stays that of reading it."""
    stops = StopStrings(tuple("a" * 500 + str(n) for n in range(1000)))
    start = time.process_time()
    for _ in range(1000):
        assert not stops.push("a" * 100)[1]
    assert time.process_time() - start < 5
    assert len(stops.flush()) == 500
