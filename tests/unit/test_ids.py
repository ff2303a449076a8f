"""Ids of completions, and of the frames of their streams."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmboost.frames import Cursor, frame_ids
from llmboost.jobs import made_at, new_id
from llmboost.streams import SEAL_ID


def test_an_id_says_when_it_was_made() -> None:
    before = int(time.time())
    made = made_at(new_id("chatcmpl"))
    assert made is not None
    assert before <= made <= time.time()


def test_ids_differ() -> None:
    assert len({new_id("cmpl") for _ in range(1000)}) == 1000


def test_other_systems_ids_are_not_ours() -> None:
    """So they can be told from our own whose streams are gone."""
    ours = new_id("chatcmpl")
    others = [
        "",
        "chatcmpl-123",
        "chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT",
        f"{ours}-1",
        f"{ours}\n",
        ours.removeprefix("chat"),
        ours.upper(),
        ours[:-1] + ("0" if ours[-1] != "0" else "1"),
        "chatcmpl-" + "٣" * 32,
    ]
    assert [made_at(each) for each in others] == [None] * len(others)


@given(st.text())
def test_anything_may_be_asked_about(text: str) -> None:
    assert made_at(text) is None
    assert made_at(f"chatcmpl-{text}") is None


@pytest.mark.parametrize("entry_id", ["0-1", "12-345", SEAL_ID])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_a_frames_id_is_a_cursor(entry_id: str, count: int) -> None:
    """Each says how many of its entry's frames have been had; the last is the entry's own."""
    ids = frame_ids(entry_id, count)
    cursors = [Cursor.parse(each) for each in ids]
    assert cursors == [*(Cursor(entry_id, had) for had in range(1, count)), Cursor(entry_id)]
    assert ids[-1] == entry_id


@pytest.mark.parametrize(
    "text",
    ["", "1", "1-", "-1", "1-2-3", "1-2.", "1-2.0", "1-2.1.1", "01-2", "1-02", "1-2.01", "+", "$", "1-1 ",
     "1-1\n", "1_0-1", "٣-١", "1-99999999999999999", "1-1.9999999"],
)  # fmt: skip
def test_what_no_frame_is_called_is_not_a_cursor(text: str) -> None:
    """A client's nonsense never reaches Redis."""
    assert Cursor.parse(text) is None
