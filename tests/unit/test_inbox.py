"""A subscription's inbox stays contiguous and bounded, whatever read of its stream comes in."""

import pytest

from llmboost import inbox as inbox_module
from llmboost.entries import FIELD
from llmboost.inbox import Inbox, RawEntry
from llmboost.streams import SEAL_ID


def entries(*ids: str) -> list[RawEntry]:
    return [(entry_id.encode(), {FIELD: b"payload"}) for entry_id in ids]


def ids(raw: list[RawEntry]) -> list[str]:
    return [entry_id.decode() for entry_id, _ in raw]


def test_takes_what_follows_its_cursor() -> None:
    """Reads that go on from one another add up."""
    inbox = Inbox()
    assert inbox.accept(entries("0-1", "1-0"), b"0-0")
    assert inbox.accept(entries("1-1"), b"1-0")
    assert ids(inbox.take()) == ["0-1", "1-0", "1-1"]
    assert inbox.take() == []


def test_a_read_for_a_reader_further_back_brings_nothing_twice() -> None:
    """Of a read that starts before the cursor, only the rest is taken; ids are compared as numbers."""
    inbox = Inbox()
    inbox.accept(entries("0-1", "1-0", "9-9"), b"0-0")
    assert not inbox.accept(entries("0-1", "1-0"), b"0-0")
    assert inbox.accept(entries("1-0", "9-9", "9-10", "10-0"), b"0-1")
    assert ids(inbox.take()) == ["0-1", "1-0", "9-9", "9-10", "10-0"]


def test_a_read_for_a_reader_further_on_is_not_taken() -> None:
    """What lies between was not read, so taking it would leave a gap."""
    inbox = Inbox()
    inbox.accept(entries("0-1"), b"0-0")
    assert not inbox.accept(entries("1-2"), b"1-1")
    assert inbox.cursor == b"0-1"


def test_a_full_inbox_takes_nothing_until_it_was_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even from a read that was sent before it was full."""
    monkeypatch.setattr(inbox_module, "ENTRIES", 2)
    inbox = Inbox()
    inbox.accept(entries("0-1", "1-0", "1-1"), b"0-0")
    assert not inbox.hungry
    assert not inbox.accept(entries("1-2"), b"1-1")
    inbox.take()
    assert inbox.hungry
    assert inbox.accept(entries("1-2"), b"1-1")


def test_the_terminal_entry_closes_it() -> None:
    """Nothing follows the seal, so nothing more is read for."""
    inbox = Inbox()
    inbox.accept(entries("0-1", SEAL_ID), b"0-0")
    assert inbox.closed
    assert not inbox.hungry
    assert ids(inbox.take()) == ["0-1", SEAL_ID]
