"""What a log has lost between two entries is never passed over, in however many parts it is read."""

import pytest

from llmboost.entries import (
    FIELD,
    GAP,
    ChoiceDelta,
    Delta,
    Entry,
    Queued,
    RawEntry,
    Started,
    StreamError,
    Terminal,
    Usage,
    decode,
    encode,
)
from llmboost.transcript import StreamGap, Transcript, read_log


def log(*entries: Entry) -> list[RawEntry]:
    return [(b"1-%d" % n, {FIELD: encode(entry)}) for n, entry in enumerate(entries)]


def delta(position: int, *token_ids: int, choice: int = 0, reason: str | None = None) -> Delta:
    return Delta([ChoiceDelta(choice, position, list(token_ids), "x", reason)])


BEGUN = [Queued("m", "", 0.0), Started("w"), delta(0, 1, 2), delta(0, 7, choice=1)]
WHOLE = log(*BEGUN, Started("v"), delta(2, 3, reason="stop"), delta(1, 8, choice=1), Terminal("v"))
LOSSES = {
    "a token": log(*BEGUN, delta(3, 4)),
    "the first token of a choice": log(*BEGUN, delta(1, 9, choice=2)),
    "a token of one choice of two": log(
        *BEGUN, Delta([*delta(2, 3).choices, *delta(2, 9, choice=1).choices])
    ),
    "nothing: a token comes twice": log(*BEGUN, delta(1, 2)),
}


@pytest.mark.parametrize("size", range(1, len(WHOLE) + 1))
def test_a_whole_log_is_read_in_parts_of_any_size(size: int) -> None:
    transcript, entries = Transcript(), []
    for start in range(0, len(WHOLE), size):
        entries += transcript.read(WHOLE[start : start + size])
    assert entries == decode(WHOLE) == read_log(WHOLE)
    assert [transcript.choices[index].token_ids for index in (0, 1)] == [[1, 2, 3], [7, 8]]
    assert transcript.choices[0].finish_reason == "stop"
    assert transcript.completion_tokens == 5
    assert transcript.terminal == Terminal("v")


@pytest.mark.parametrize("lost", LOSSES)
@pytest.mark.parametrize("size", range(1, 6))
def test_reading_breaks_off_where_something_is_missing(lost: str, size: int) -> None:
    """What was read together, and came before, is not lost with it."""
    raw = LOSSES[lost]
    last = (len(raw) - 1) // size * size
    transcript, entries = Transcript(), []
    for start in range(0, last, size):
        entries += transcript.read(raw[start : start + size])
    with pytest.raises(StreamGap) as gap:
        transcript.read(raw[last:])
    assert entries + gap.value.before == decode(raw[: len(BEGUN)])


@pytest.mark.parametrize("lost", LOSSES)
def test_a_log_that_has_lost_a_part_does_not_end_well(lost: str) -> None:
    """While nobody has sealed it, it has no end; an end that is an error already says more."""
    before = decode(LOSSES[lost][: len(BEGUN)])
    failed = Terminal("w", error=StreamError("It failed."))
    for end, told in ((Terminal("w", Usage(1, 4)), Terminal("w", Usage(1, 4), GAP)), (failed, failed)):
        raw = [*LOSSES[lost], *log(delta(9, 9)), (b"9-0", {FIELD: encode(end)})]
        assert read_log(raw) == [*before, ("9-0", told)]
        assert read_log(raw[:-1]) == before
