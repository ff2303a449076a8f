"""Server-sent events: entries of token streams in, whole frames out.

A frame is `data: …` and a blank line. What comes from an entry begins with an `id:` line: whoever gives it
back gets the frames that follow it, wherever the connection broke.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Protocol, cast

from sse_starlette import EventSourceResponse
from starlette.types import Message, Send

from llmboost.entries import ChoiceDelta, Delta, Entry, StreamError, Terminal, TokenLogprob, Usage
from llmboost.frames import frame_ids
from llmboost.settings import ApiSettings
from llmboost.streams import position
from llmboost_api import errors
from llmboost_api.answer import add_usage
from llmboost_api.errors import ApiError
from llmboost_api.merge import Step
from llmboost_api.protocol.form import Form
from llmboost_api.resume import ResumePoint

DONE = b"data: [DONE]\n\n"
PING = b": ping\n"
"""One line break only: after an `id:` line, official clients parse whatever a blank line ends, and fail."""

RETRY = b"retry: 500\n"
"""Begins a frame, for a lone one is more than official clients take. Browsers wait 3 s by default before
they connect again, which is most of the grace."""


def ping() -> bytes:
    """A keep-alive."""
    return PING


def event_source(frames: AsyncIterator[bytes], settings: ApiSettings) -> EventSourceResponse:
    """A response that sends the frames as they are, and keep-alives between them."""
    return _EventSource(
        frames,
        sep="\n",
        ping=settings.ping_interval,
        # Typed as an event, taken as bytes: an event would end in a blank line.
        ping_message_factory=cast("Callable[[], Any]", ping),
        send_timeout=settings.send_timeout,
    )


class _EventSource(EventSourceResponse):
    """Differs from sse-starlette's response in this: a message that the connection takes at once is sent
    without a time limit. To set one costs as much as to send a token."""

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        # uvicorn's `send` is a coroutine, and what wraps it too.
        sending = cast("Coroutine[Any, Any, None]", send(message))
        try:
            awaited = sending.send(None)
        except StopIteration:
            return
        await super()._send_with_timeout(lambda _: _Begun(sending, awaited), message)


class _Begun:
    """The rest of a coroutine that waits for something."""

    def __init__(self, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._coroutine = coroutine
        self._awaited = awaited

    def __await__(self) -> Generator[Any, Any, None]:
        awaited = self._awaited
        try:
            while True:
                try:
                    sent = yield awaited
                except BaseException as error:
                    awaited = self._coroutine.throw(error)
                else:
                    awaited = self._coroutine.send(sent)
        except StopIteration:
            return


class Frames(Protocol):
    """What a protocol makes of the entries of one answer."""

    ended: bool
    early_error: StreamError | None
    """In which the stream ended before it had shown anything."""

    def frames(self, step: Step, /) -> bytes:
        """All frames of entries that came together, for one write. May be none."""

    def failure(self, error: ApiError, /) -> bytes:
        """What ends a stream that this pod can't go on with."""


class Framer:
    """A stream of chunks, and what OpenAI's protocol wants around them."""

    def __init__(
        self, form: Form, completion_id: str, *, event_ids: bool, after: ResumePoint | None = None
    ) -> None:
        """With `after`, nothing comes out but what follows it; all before it is taken all the same."""
        self.ended = False
        self.early_error: StreamError | None = None
        self._shape = form.shape(completion_id)
        self._n = form.n
        self._open_jobs = form.jobs
        # An id is a place in one stream; several have none in common.
        self._event_ids = event_ids and form.jobs == 1
        self._after = after
        self._send_usage = form.usage
        self._usage = Usage(0, 0)
        self._begun: set[int] = set()
        self._held: defaultdict[int, list[TokenLogprob]] = defaultdict(list)

    def frames(self, step: Step) -> bytes:
        """All frames of entries that came together, for one write. May be none.

        Raises:
            ApiError: the frame to go on after does not exist (400).
        """
        job, entries = step
        out: list[bytes] = []
        for entry_id, entry in entries:
            frames = self._frames_of(job, entry)
            if self._event_ids and frames:
                ids = frame_ids(entry_id, len(frames))
                frames = [b"id: %b\n%b" % (i.encode(), frame) for i, frame in zip(ids, frames, strict=True)]
            if self._after is not None:
                frames = self._following(self._after, entry_id, frames)
            out += frames
        return b"".join(out)

    def failure(self, error: ApiError) -> bytes:
        """As a frame without an id: the stream may go on elsewhere."""
        return error.frame()

    def _following(self, after: ResumePoint, entry_id: str, frames: list[bytes]) -> list[bytes]:
        """Those of an entry's frames that the client has not had."""
        here, there = position(entry_id), position(after.cursor.entry_id)
        if here < there:
            return []
        had = after.cursor.frames
        if here > there or (had is not None and had >= len(frames)):
            raise after.not_found()
        self._after = None
        return [] if had is None else frames[had:]

    def _frames_of(self, job: int, entry: Entry) -> list[bytes]:
        out: list[bytes] = []
        if isinstance(entry, Delta):
            for delta in entry.choices:
                self._add_delta(out, job * self._n + delta.index, delta)
        elif isinstance(entry, Terminal):
            self._add_end(out, entry)
        return out

    def _add_delta(self, out: list[bytes], index: int, delta: ChoiceDelta) -> None:
        logprobs: list[TokenLogprob] = []
        if delta.logprobs or index in self._held:
            logprobs = self._held.pop(index, logprobs) + (delta.logprobs or [])
        first = index not in self._begun
        if delta.text or (delta.finish_reason is not None and first):
            self._begun.add(index)
            out.append(b"data: %b\n\n" % self._shape.content(index, delta.text, logprobs, first))
            logprobs = []
        if delta.finish_reason is not None:
            out.append(b"data: %b\n\n" % self._shape.finish(index, delta.finish_reason, logprobs))
        elif logprobs:
            # Tokens without a visible character yet: a chunk would be empty, so they go with the next.
            self._held[index] = logprobs

    def _add_end(self, out: list[bytes], terminal: Terminal) -> None:
        if terminal.error is not None:
            self.ended = True
            self.early_error = None if self._begun else terminal.error
            out.append(errors.from_stream(terminal.error).frame())
            return
        self._usage = add_usage(self._usage, terminal.usage)
        self._open_jobs -= 1
        if self._open_jobs == 0:
            self.ended = True
            if self._send_usage:
                out.append(b"data: %b\n\n" % self._shape.usage(self._usage))
            out.append(DONE)
