"""Responses: their events are a pure function of the log, and a conversation's prompts extend one another."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from llmboost.audience import NOBODY_READS
from llmboost.entries import (
    ChoiceDelta,
    Delta,
    Entry,
    Queued,
    ReadEntry,
    Started,
    StreamError,
    Terminal,
    TokenLogprob,
    Usage,
)
from llmboost.jobs import new_id
from llmboost.streams import SEAL_ID
from llmboost_api.answer import Answer
from llmboost_api.body import check
from llmboost_api.ending import CANCELLED
from llmboost_api.errors import ApiError
from llmboost_api.protocol.form import RESPONSES, Form, decode_form
from llmboost_api.protocol.responses.events import EventFramer
from llmboost_api.protocol.responses.items import listed
from llmboost_api.protocol.responses.object import Progress
from llmboost_api.protocol.responses.request import ResponseRequest
from llmboost_worker.models import DEMO_FOLDER
from llmboost_worker.text import Tokenizer, encode_prompt

RESPONSE_ID = new_id("resp_")


def asked(**fields: Any) -> ResponseRequest:
    return check({"model": "m", "input": "Hello", **fields}, ResponseRequest)


def form(**fields: Any) -> Form:
    return Form(RESPONSES.name, "m", 1, 2.0, 1, 1, False, False, False, asked(**fields).repeated)


def framer(after: int = -1, *, waits: bool = False, **fields: Any) -> EventFramer:
    return EventFramer(form(**fields).response(RESPONSE_ID), event_ids=True, after=after, waits=waits)


def log(*entries: Entry) -> list[ReadEntry]:
    """Entries under the ids that they would have."""
    out: list[ReadEntry] = [("0-1", Queued("m", "", 1.0))]
    attempt = n = 0
    for entry in entries:
        attempt, n = (attempt + 1, 0) if isinstance(entry, Started) else (attempt, n + 1)
        out.append((SEAL_ID if isinstance(entry, Terminal) else f"{attempt}-{n}", entry))
    return out


def delta(position: int, text: str, reason: str | None = None) -> Delta:
    logprobs = [TokenLogprob(text, -1.0, list(text.encode()))]
    return Delta([ChoiceDelta(0, position, [position], text, reason, logprobs)])


BEGUN = (Started("w"), delta(0, "Once"), delta(1, ""), Started("v"), delta(2, " upon"))
ANSWERED = log(*BEGUN, delta(3, "", "stop"), Terminal("v", Usage(3, 4, 2), at=5.5))
CUT_SHORT = log(*BEGUN, delta(3, " a", "length"), Terminal("v", Usage(3, 4), at=5.5))
BROKEN = log(*BEGUN, Terminal("v", error=StreamError("It broke.")))
STOPPED = log(*BEGUN, Terminal("pod", error=CANCELLED))
UNREAD = log(*BEGUN, Terminal("v", error=NOBODY_READS))
RUNNING = log(*BEGUN)
NEVER_RUN = log(Terminal("reaper", error=StreamError("Too late.", status=504)))
LOGS = [ANSWERED, CUT_SHORT, BROKEN, STOPPED, UNREAD, RUNNING, NEVER_RUN]
STATUSES = ["completed", "incomplete", "failed", "cancelled", "cancelled", "in_progress", "failed"]


def frames_of(written: bytes) -> list[bytes]:
    return [frame + b"\n\n" for frame in written.split(b"\n\n")[:-1]]


def data_of(frame: bytes) -> Any:
    lines = dict(line.split(b": ", 1) for line in frame.splitlines() if line)
    data = json.loads(lines[b"data"])
    assert lines[b"event"].decode() == data["type"]
    assert int(lines[b"id"]) == data["sequence_number"]
    return data


def kinds(frames: Sequence[bytes]) -> list[str]:
    return [data_of(frame)["type"].removeprefix("response.") for frame in frames]


def test_events_come_in_order() -> None:
    """A takeover and entries without text show nothing."""
    begun = ["created", "in_progress", "output_item.added", "content_part.added"]
    begun += ["output_text.delta", "output_text.delta"]
    done = ["output_text.done", "content_part.done", "output_item.done"]
    wanted = [
        [*begun, *done, "completed"],
        [*begun, "output_text.delta", *done, "incomplete"],
        [*begun, "failed"],
        [*begun, "cancelled"],
        [*begun, "cancelled"],
        begun,
        ["created", "failed"],
    ]
    for entries, expected in zip(LOGS, wanted, strict=True):
        frames = frames_of(framer().frames((0, entries)))
        assert kinds(frames) == expected
        assert [data_of(frame)["sequence_number"] for frame in frames] == list(range(len(expected)))
        background = kinds(frames_of(framer(background=True).frames((0, entries))))
        assert background == ["created", "queued", *expected[1:]]


def test_every_event_is_of_its_official_type() -> None:
    event: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for entries, status in zip(LOGS, STATUSES, strict=True):
        for frame in frames_of(framer(background=True, metadata={"a": "b"}).frames((0, entries))):
            data = data_of(frame)
            if data["type"] == "response.cancelled":
                Response.model_validate(data["response"], strict=True)
            else:
                event.validate_python(data, strict=True)
        assert status in (data.get("response", {}).get("status"), "in_progress")


@given(st.sampled_from(LOGS), st.integers(-1, 15), st.lists(st.integers(0, 10)), st.booleans(), st.booleans())
def test_what_follows_any_event_is_the_rest(
    entries: list[ReadEntry], after: int, cuts: list[int], background: bool, waits: bool
) -> None:
    """However the entries come together, what follows an event is the same bytes that would have followed."""
    whole = frames_of(framer(background=background).frames((0, entries)))
    made = framer(after, background=background, waits=waits)
    places = [0, *sorted(min(cut, len(entries)) for cut in cuts), len(entries)]
    parts = [entries[start:end] for start, end in itertools.pairwise(places)]
    assert b"".join(made.frames((0, part)) for part in parts) == b"".join(whole[after + 1 :])
    assert made.ended == (entries[-1][0] == SEAL_ID)


def test_deltas_make_the_text_that_is_done() -> None:
    """So do their logprobs; and the object that is fetched is the one that the last event has."""
    answer = Answer(form(), RESPONSE_ID)
    answer.take(0, ANSWERED)
    events = [data_of(frame) for frame in frames_of(framer().frames((0, ANSWERED)))]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    done = next(event for event in events if event["type"] == "response.output_text.done")
    assert "".join(event["delta"] for event in deltas) == done["text"] == "Once upon"
    carried = [token for event in deltas for token in event["logprobs"]]
    assert carried == done["logprobs"][:3]
    assert [token["token"] for token in done["logprobs"]] == ["Once", "", " upon", ""]
    assert json.loads(answer.encode()) == events[-1]["response"]
    assert events[-1]["response"]["completed_at"] == 5


def test_the_status_is_told_by_the_log() -> None:
    """And the object says the same; waiting is a status, too."""
    for entries, status in zip([*LOGS, log()], [*STATUSES, "queued"], strict=True):
        progress = Progress()
        for _, entry in entries:
            progress.take(entry)
        assert progress.status == status
        assert form().response(RESPONSE_ID).at(progress)["status"] == status


def test_an_early_failure_is_told_apart() -> None:
    """Only where nothing was shown, and not if somebody wanted it to end."""
    for entries, early in ((NEVER_RUN, True), (BROKEN, False), (log(Terminal("p", error=CANCELLED)), False)):
        made = framer(waits=True)
        for each in entries:
            made.frames((0, [each]))
        assert (made.early_error is not None) == early
        made = framer()
        made.frames((0, entries))
        assert made.early_error is None


def test_nothing_is_shown_before_there_is_text() -> None:
    made = framer(waits=True)
    assert made.frames((0, RUNNING[:2])) == b""
    assert len(frames_of(made.frames((0, RUNNING[2:3])))) == 5


def test_a_stream_that_breaks_says_where_to_go_on() -> None:
    """The failure is no event of the response: its number is the last one's."""
    made = framer()
    made.frames((0, RUNNING))
    last = json.loads(made.failure(ApiError(503, "Going.", code="server_shutdown")).splitlines()[1][6:])
    assert (last["type"], last["sequence_number"]) == ("error", 5)
    assert last["error"]["message"] == last["message"] == "Going."
    waiting = framer(waits=True)
    waiting.frames((0, RUNNING[:1]))
    *sent, error = frames_of(waiting.failure(ApiError(503, "Going.")))
    assert kinds(sent) == ["created"]
    assert b'"sequence_number":0' in error


def test_forms_of_older_streams_are_read() -> None:
    """They were written without what a response repeats."""
    old = msgspec.msgpack.encode(["chat", "m", 1, 2.0, 1, 1, False, False, False])
    assert decode_form(old).repeated == b""
    assert decode_form(form().encode()) == form()


def test_items_have_the_same_ids_each_time() -> None:
    parts = [{"type": "input_text", "text": text} for text in ("a", "c")]
    kept = asked(input=[{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}])
    items = listed(RESPONSE_ID, kept.messages_to_store or [])
    assert items == listed(RESPONSE_ID, kept.messages_to_store or [])
    assert items[0]["content"] == parts
    assert [part["type"] for part in items[1]["content"]] == ["output_text"]
    assert kept.prompts()[0].messages == [
        {"role": "user", "content": "a\nc"},
        {"role": "assistant", "content": "b"},
    ]
    assert len({item["id"] for item in items}) == 2


@pytest.mark.parametrize("instructions", [None, "You are a helpful assistant."])
def test_the_next_turns_prompt_begins_with_this_ones(instructions: str | None) -> None:
    """Token by token, so that what a prefix cache has of a conversation is found again."""
    tokenizer = Tokenizer.load(DEMO_FOLDER)
    history: list[dict[str, Any]] = []
    before: list[int] = []
    for said, answer in (("Hello.", "Hi there!"), ("Tell me a story.", "Once upon a time…"), ("Go on.", "")):
        turn = asked(input=said, instructions=instructions)
        (prompt,) = turn.prompts_after(history)
        ids = encode_prompt(tokenizer, prompt)
        assert ids[: len(before)] == before
        assert len(ids) > len(before)
        before = ids
        history += [*(turn.messages_to_store or []), {"role": "assistant", "content": [answer]}]
