"""Frames: whole ones in each write, an id with each, no `[DONE]` after an error."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from sse_starlette.sse import SendTimeoutError

from llmboost.entries import ChoiceDelta, Delta, Entry, Started, StreamError, Terminal, Usage
from llmboost.frames import Cursor
from llmboost.settings import ApiSettings
from llmboost.streams import SEAL_ID
from llmboost_api.errors import ApiError
from llmboost_api.protocol.form import Form
from llmboost_api.resume import ResumePoint
from llmboost_api.sse import Framer, event_source


def framer(after: ResumePoint | None = None, **fields: Any) -> Framer:
    defaults: dict[str, Any] = {
        "endpoint_name": "chat",
        "model": "m",
        "created": 1,
        "deadline": 2.0,
        "jobs": 1,
        "n": 1,
        "logprobs": False,
        "usage_null": False,
        "usage": False,
    }
    return Framer(Form(**{**defaults, **fields}), "chatcmpl-1", event_ids=True, after=after)


def texts(*words: str) -> Iterable[tuple[str, Entry]]:
    for n, word in enumerate(words):
        yield f"1-{n + 1}", Delta([ChoiceDelta(0, n, [n], word)])


def test_what_came_together_is_one_write() -> None:
    """Tokens that wait together leave in one write, each in its own frame with its own cursor."""
    made = framer()
    written = made.frames((0, [("1-0", Started("w")), *texts("a", "b", "c")]))
    events = written.decode().removesuffix("\n\n").split("\n\n")
    assert [event.split("\n")[0] for event in events] == ["id: 1-1", "id: 1-2", "id: 1-3"]
    chunks = [json.loads(event.split("\n")[1].removeprefix("data: ")) for event in events]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["a", "b", "c"]
    assert not made.ended


def test_entries_that_show_nothing_write_nothing() -> None:
    assert framer().frames((0, [("1-0", Started("w")), *texts("")])) == b""


def test_a_takeover_is_invisible() -> None:
    """A second attempt goes on where the first one stopped, in the same stream of chunks."""
    made = framer()
    made.frames((0, list(texts("a"))))
    written = made.frames((0, [("2-0", Started("w")), ("2-1", Delta([ChoiceDelta(0, 1, [1], "b")]))]))
    assert written.startswith(b"id: 2-1\ndata: ")
    assert b'"delta":{"content":"b"}' in written


def test_done_comes_with_the_last_entry() -> None:
    made = framer()
    written = made.frames((0, [*texts("a"), (SEAL_ID, Terminal("w", Usage(1, 1)))]))
    assert written.endswith(f"id: {SEAL_ID}\ndata: [DONE]\n\n".encode())
    assert made.ended


def test_nothing_is_done_after_an_error() -> None:
    made = framer()
    written = made.frames((0, [*texts("a"), (SEAL_ID, Terminal("w", error=StreamError("no")))]))
    assert b"[DONE]" not in written
    assert made.ended


def test_several_jobs_are_done_together() -> None:
    """One [DONE], one usage that adds up, and no cursors, for they belong to different streams."""
    made = framer(jobs=2, usage=True)
    first = made.frames((1, [*texts("a"), (SEAL_ID, Terminal("w", Usage(1, 2, 1)))]))
    assert b'"index":1' in first
    assert not made.ended
    second = made.frames((0, [(SEAL_ID, Terminal("w", Usage(3, 4)))]))
    assert b"[DONE]" not in first
    assert b"id: " not in first + second
    assert json.loads(second.split(b"\n\n")[0].removeprefix(b"data: "))["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


MIXED: list[tuple[str, Entry]] = [
    ("1-0", Started("w")),
    ("1-1", Delta([ChoiceDelta(0, 0, [1], "a"), ChoiceDelta(1, 0, [1], "")])),
    ("1-2", Delta([ChoiceDelta(1, 1, [2], "x"), ChoiceDelta(0, 1, [2], "b", "stop")])),
    ("2-0", Started("w")),
    ("2-1", Delta([ChoiceDelta(1, 2, [3], "", "length")])),
    (SEAL_ID, Terminal("w", Usage(1, 5))),
]
"""Of two choices: entries with no frame, with one and with several."""


def split(written: bytes) -> list[bytes]:
    return [frame + b"\n\n" for frame in written.split(b"\n\n")[:-1]]


def id_of(frame: bytes) -> str:
    return frame.split(b"\n")[0].removeprefix(b"id: ").decode()


def resume_after(frame_id: str) -> ResumePoint:
    cursor = Cursor.parse(frame_id)
    assert cursor is not None
    return ResumePoint(frame_id, cursor, "starting_after")


def test_every_frame_has_an_id_of_its_own() -> None:
    frames = split(framer(n=2, usage=True).frames((0, MIXED)))
    assert [id_of(frame) for frame in frames] == [
        "1-1",
        "1-2.1",
        "1-2.2",
        "1-2",
        "2-1",
        f"{SEAL_ID}.1",
        SEAL_ID,
    ]


@pytest.mark.parametrize("together", [True, False])
def test_what_follows_any_frame_is_the_rest(together: bool) -> None:
    """However the entries come, what follows a frame is what would have followed it, byte for byte."""
    frames = split(framer(n=2, usage=True).frames((0, MIXED)))
    for had, frame in enumerate(frames, start=1):
        made = framer(resume_after(id_of(frame)), n=2, usage=True)
        steps = [MIXED] if together else [[each] for each in MIXED]
        assert b"".join(made.frames((0, step)) for step in steps) == b"".join(frames[had:])
        assert made.ended


def test_entries_without_frames_are_places_too() -> None:
    """Whoever names an entry that showed nothing gets what follows it."""
    frames = split(framer(n=2).frames((0, MIXED)))
    assert framer(resume_after("1-0"), n=2).frames((0, MIXED)) == b"".join(frames)
    assert split(framer(resume_after("2-0"), n=2).frames((0, MIXED)))[0] == frames[4]


@pytest.mark.parametrize("frame_id", ["1-0.1", "1-1.1", "1-2.3", "1-3", "0-9", f"{SEAL_ID}.2"])
def test_a_frame_that_is_not_there_is_refused(frame_id: str) -> None:
    with pytest.raises(ApiError, match=frame_id) as refused:
        framer(resume_after(frame_id), n=2, usage=True).frames((0, MIXED))
    assert (refused.value.status, refused.value.param) == (400, "starting_after")


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


async def test_each_step_is_one_body_message() -> None:
    """What the framer made leaves as it is, in one message to the server."""
    sent: list[dict[str, Any]] = []

    async def frames() -> AsyncIterator[bytes]:
        yield b"data: 1\n\ndata: 2\n\n"
        yield b"data: 3\n\n"

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST"}
    await event_source(frames(), ApiSettings(ping_interval=0))(scope, never, send)
    bodies = [message["body"] for message in sent if message["type"] == "http.response.body"]
    assert bodies == [b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n", b""]


async def test_a_client_that_reads_nothing_is_dropped() -> None:
    """`send_timeout` ends the response and closes its source."""
    closed = False

    async def frames() -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            while True:
                yield b"data: 1\n\n"
        finally:
            closed = True

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never()

    scope = {"type": "http", "method": "POST"}
    with pytest.raises(SendTimeoutError):
        await event_source(frames(), ApiSettings(ping_interval=0, send_timeout=0.01))(scope, never, send)
    assert closed


class FullConnection:
    """Takes nothing of a body while it is full."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.has_room = asyncio.Event()
        self.is_waited_for = asyncio.Event()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.is_waited_for.set()
            await self.has_room.wait()
            await asyncio.sleep(0)  # one more of several waits in one send
            self.bodies.append(message["body"])


async def one_frame() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"


async def test_a_client_that_reads_again_in_time_gets_everything() -> None:
    connection = FullConnection()
    response = event_source(one_frame(), ApiSettings(ping_interval=0, send_timeout=60))
    sending = asyncio.create_task(response({"type": "http", "method": "POST"}, never, connection.send))
    await connection.is_waited_for.wait()
    connection.has_room.set()
    await sending
    assert connection.bodies == [b"data: 1\n\n", b""]


async def test_a_send_that_waits_can_be_cancelled() -> None:
    connection = FullConnection()
    response = event_source(one_frame(), ApiSettings(ping_interval=0, send_timeout=60))
    sending = asyncio.create_task(response({"type": "http", "method": "POST"}, never, connection.send))
    await connection.is_waited_for.wait()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    assert connection.bodies == []
