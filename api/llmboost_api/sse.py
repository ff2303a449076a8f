"""Server-sent events: entries of token streams in, whole frames out.

A frame is `data: …` and a blank line. The last frame of an entry begins with an `id:` line, the entry's
cursor: whoever has read it has read the entry.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from sse_starlette import EventSourceResponse

from llmboost.entries import ChoiceDelta, Delta, Terminal, TokenLogprob, Usage
from llmboost.settings import ApiSettings
from llmboost_api import errors
from llmboost_api.errors import ApiError
from llmboost_api.generation import Step
from llmboost_api.protocol.shape import Shape

DONE = b"data: [DONE]\n\n"
PING = b": ping\n"
"""One line break only: after an `id:` line, official clients parse whatever a blank line ends, and fail."""


def ping() -> bytes:
    """A keep-alive."""
    return PING


def event_source(frames: AsyncIterator[bytes], settings: ApiSettings) -> EventSourceResponse:
    """A response that sends the frames as they are, and keep-alives between them."""
    return EventSourceResponse(
        frames,
        sep="\n",
        ping=settings.ping_interval,
        # Typed as an event, taken as bytes: an event would end in a blank line.
        ping_message_factory=cast("Callable[[], Any]", ping),
        send_timeout=settings.send_timeout,
    )


def error_frame(error: ApiError) -> bytes:
    """An error in the middle of a stream. No `[DONE]` follows."""
    return b"data: " + error.body() + b"\n\n"


class Framer:
    """One response's stream: chunks, and what OpenAI's protocol wants around them."""

    def __init__(self, shape: Shape, *, jobs: int, n: int, event_ids: bool, usage: bool) -> None:
        """`jobs` of `n` choices each. `usage`: end with a usage chunk."""
        self.ended = False
        self._shape = shape
        self._n = n
        self._open_jobs = jobs
        # A cursor is a place in one stream; several have none in common.
        self._event_ids = event_ids and jobs == 1
        self._send_usage = usage
        self._usage = Usage(0, 0)
        self._begun: set[int] = set()
        self._held: defaultdict[int, list[TokenLogprob]] = defaultdict(list)

    def frames(self, step: Step) -> bytes:
        """All frames of entries that came together, for one write. May be none."""
        job, entries = step
        out: list[bytes] = []
        for cursor, entry in entries:
            before = len(out)
            if isinstance(entry, Delta):
                for delta in entry.choices:
                    self._add_delta(out, job * self._n + delta.index, delta)
            elif isinstance(entry, Terminal):
                self._add_end(out, entry)
            if self._event_ids and len(out) > before:
                out[-1] = b"id: %b\n%b" % (cursor.encode(), out[-1])
        return b"".join(out)

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
            out.append(error_frame(errors.from_stream(terminal.error)))
            return
        self._usage = add_usage(self._usage, terminal.usage)
        self._open_jobs -= 1
        if self._open_jobs == 0:
            self.ended = True
            if self._send_usage:
                out.append(b"data: %b\n\n" % self._shape.usage(self._usage))
            out.append(DONE)


def add_usage(one: Usage, other: Usage | None) -> Usage:
    """The usage of two jobs together."""
    if other is None:
        return one
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
    )
