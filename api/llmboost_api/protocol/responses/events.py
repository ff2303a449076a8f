"""The events of a streamed response: OpenAI's, in OpenAI's order, each with its number.

The events are a pure function of the log, entry by entry: whichever pod writes them, and however the entries
come, an event has the same number and the same bytes. So a number is a place to go on from.

- `Queued`: `response.created`; in the background also `response.queued`.
- The first `Started`: `response.in_progress`. A later attempt's makes none.
- A delta with text: `response.output_text.delta`, and before the first of them `response.output_item.added`
  and `response.content_part.added`. A delta without text makes none.
- `Terminal`: `response.output_text.done`, `response.content_part.done`, `response.output_item.done`, and
  `response.completed` or `response.incomplete`; or, if it is an error, `response.failed` or
  `response.cancelled` alone.

OpenAI documents no event for a cancelled response. Its client hands one of an unknown type on as it is, and
both its iterators end with the stream. `response.failed` would name an error where there is none, and code
that waits for it would take what was wanted for a fault.
"""

from collections.abc import Iterable
from typing import Any

from llmboost.entries import ChoiceDelta, Delta, Entry, Queued, ReadEntry, Started, StreamError, Terminal
from llmboost_api.errors import ApiError
from llmboost_api.protocol.responses.items import text_part
from llmboost_api.protocol.responses.object import Progress, ResponseObject, logprobs
from llmboost_api.protocol.shape import encode_json


class ResponseEvents:
    """Makes the events of one response, without their `id:` lines."""

    def __init__(self, response: ResponseObject) -> None:
        self.progress = Progress()
        self.count = 0
        """Events so far: the next one's number."""
        self._response = response
        self._added = False
        self._unsent = 0
        """Logprobs of the choice that no event has carried yet, counted from the end."""
        self._place: dict[str, Any] = {"item_id": response.item_id, "output_index": 0, "content_index": 0}
        self._place_json = encode_json(self._place)[1:-1]

    def of(self, entry: Entry) -> list[bytes]:
        """The events of the next entry."""
        out: list[bytes] = []
        match entry:
            case Queued():
                background = self._response.background
                self._add_object(out, "created", "queued" if background else "in_progress")
                if background:
                    self._add_object(out, "queued", "queued")
            case Started():
                if not self.progress.started:
                    self.progress.take(entry)
                    self._add_object(out, "in_progress")
            case Delta():
                for delta in entry.choices:
                    self._add_delta(out, delta)
            case Terminal():
                self.progress.take(entry)
                self._add_end(out, entry)
        return out

    def _add(self, out: list[bytes], kind: str, fields: dict[str, Any]) -> None:
        body = encode_json({"type": f"response.{kind}", "sequence_number": self.count, **fields})
        out.append(b"event: response.%b\ndata: %b\n\n" % (kind.encode(), body))
        self.count += 1

    def _add_object(self, out: list[bytes], kind: str, status: Any = None) -> None:
        self._add(out, kind, {"response": self._response.at(self.progress, status)})

    def _add_delta(self, out: list[bytes], delta: ChoiceDelta) -> None:
        self.progress.choice.add(delta)
        self._unsent += len(delta.logprobs or ())
        if not delta.text:
            return  # Its logprobs go with the next.
        self._add_message(out)
        carried = b"[]"
        if self._unsent:
            carried = encode_json(logprobs(self.progress.choice.logprobs[-self._unsent :]))
            self._unsent = 0
        out.append(
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta",'
            b'"sequence_number":%d,%b,"delta":%b,"logprobs":%b}\n\n'
            % (self.count, self._place_json, encode_json(delta.text), carried)
        )
        self.count += 1

    def _add_message(self, out: list[bytes]) -> None:
        """Says that there is a message, unless it was said."""
        if not self._added:
            self._added = True
            item = self._response.message("in_progress", [])
            self._add(out, "output_item.added", {"output_index": 0, "item": item})
            self._add(out, "content_part.added", {**self._place, "part": text_part("")})

    def _add_end(self, out: list[bytes], terminal: Terminal) -> None:
        if terminal.error is None:
            self._add_message(out)
            item = self._response.item(self.progress)
            (part,) = item["content"]
            done = {**self._place, "text": part["text"], "logprobs": part["logprobs"]}
            self._add(out, "output_text.done", done)
            self._add(out, "content_part.done", {**self._place, "part": part})
            self._add(out, "output_item.done", {"output_index": 0, "item": item})
        self._add_object(out, self.progress.status)


class EventFramer:
    """One response's stream: its events with their ids, from the first or from behind any."""

    def __init__(
        self, response: ResponseObject, *, event_ids: bool, after: int = -1, waits: bool = False
    ) -> None:
        """`after`: number of the last event that the client has had. `waits`: nothing comes out before there
        is text, or the end, so that an early failure can have its own status."""
        self.ended = False
        self.early_error: StreamError | None = None
        """In which the stream ended before it had shown anything."""
        self._events = ResponseEvents(response)
        self._event_ids = event_ids
        self._after = after
        self._waits = waits
        self._held: list[bytes] = []

    def frames(self, step: tuple[int, Iterable[ReadEntry]]) -> bytes:
        """All frames of entries that came together, for one write. May be none."""
        _, entries = step
        progress = self._events.progress
        for _, entry in entries:
            number = self._events.count
            for event in self._events.of(entry):
                if number > self._after:
                    self._held.append(b"id: %d\n%b" % (number, event) if self._event_ids else event)
                number += 1
        if progress.terminal is not None:
            self.ended = True
            if self._waits and not progress.begun and progress.status == "failed":
                self.early_error = progress.terminal.error
        elif self._waits and not progress.begun:
            return b""
        return self._release()

    def failure(self, error: ApiError) -> bytes:
        """What ends a stream that this pod can't go on with. It is no event of the response, so its number is
        that of the last one: the number to go on after. Official clients raise it."""
        released = self._release()
        body = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": max(self._events.count - 1, self._after),
            "error": error.object(),
        }
        return released + b"event: error\ndata: %b\n\n" % encode_json(body)

    def _release(self) -> bytes:
        frames = b"".join(self._held)
        self._held.clear()
        return frames
