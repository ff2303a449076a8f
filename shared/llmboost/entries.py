"""What comes back: the entries of a token stream, as plain data. `llmboost.streams` holds their protocol."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

FIELD = b"e"
"""The field of an entry in Redis that holds its msgpack. Others are the scripts'."""
SEALED_AT = b"at"
"""Beside the terminal entry: the time (ms) at which it was written."""

CANCELLED_TYPE = "request_cancelled"
"""Type of the errors in which a stream ends because somebody wanted it to: by its id, or by leaving."""


class StreamError(msgspec.Struct, frozen=True, array_like=True):
    """Why a request failed, in the terms of OpenAI's error object."""

    message: str
    type: str = "server_error"
    code: str | None = None
    param: str | None = None
    status: int = 500
    """HTTP status, if no byte of the response has been sent."""


REQUEST_LOST = StreamError(
    "The request was lost before it was answered. Send it again.", code="request_lost", status=500
)
"""With the server of Redis: the whole of it, or a part of its log."""
GAP = StreamError(
    "A part of the answer was lost, so it ends here. Send the request again.", code="stream_gap", status=500
)
"""The end of a log with a gap, for whoever reads it: it is never written."""


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token's logprob and its likeliest alternatives, best first."""

    token: str
    logprob: float | None
    """None: of a prompt's first token, which follows nothing."""
    bytes: list[int] | None = None
    """UTF-8 bytes; a token may be part of a character."""
    top: "tuple[TokenLogprob, ...]" = ()
    width: int | None = None
    """Characters that it adds to the text; None: those of `token`."""


class ChoiceDelta(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one choice."""

    index: int
    position: int
    """Tokens of this choice before `token_ids`."""
    token_ids: list[int]
    text: str
    """Whole characters that the client may see; may be empty while ids are not."""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    """Of `token_ids`; with the prompt's text, of the prompt's tokens."""


class Queued(msgspec.Struct, frozen=True, array_like=True, tag="queued"):
    """First entry: the request was accepted."""

    model: str
    owner: str
    created: float
    form: bytes = b""
    """How the answer is to be written down: whoever accepted the request knows, and nobody else looks."""


class Started(msgspec.Struct, frozen=True, array_like=True, tag="started"):
    """An attempt's fence."""

    worker: str


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="delta"):
    """New output of one or more choices."""

    choices: list[ChoiceDelta]
    prompt_tokens: int | None = None
    """In an attempt's first delta."""


class Terminal(msgspec.Struct, frozen=True, array_like=True, tag="terminal"):
    """Last entry; `error` is None if the request was answered in full."""

    by: str
    """Who sealed it, so that after a lost reply the sealer knows its own entry."""
    usage: Usage | None = None
    error: StreamError | None = None
    at: float | None = None
    """Unix time (s) of the seal, by the server's clock: read, never written, so a seal can be sent again."""


Entry = Queued | Started | Delta | Terminal
RawEntry = tuple[bytes, dict[bytes, bytes]]
"""An entry of an XRANGE or XREAD reply."""
ReadEntry = tuple[str, Entry]
"""(entry id, entry); the id is an opaque cursor to everyone outside this module."""


@dataclass(frozen=True, slots=True)
class ArqJob:
    """A job for an arq worker, enqueued by a script, in the same move as whatever makes it due."""

    queue: str
    id: str
    definition: bytes


@dataclass(frozen=True, slots=True)
class FollowUp:
    """What follows from a request's end: kept in its first entry, done by whoever seals it."""

    retention: float | None = None
    """Seconds that the sealed stream stays readable; None: as long as any."""
    push_to: str = ""
    """Key of a list that the id is pushed onto."""
    expires_with: str = ""
    """Key that is to expire together with the stream."""
    job: ArqJob | None = None
    """Is enqueued."""

    def fields(self) -> list[str | bytes | int]:
        """As fields of the first entry, beside the entry itself. Only the seal's script reads them."""
        retention = None if self.retention is None else int(self.retention * 1000)
        each: dict[str, str | bytes | int | None] = {
            "retention": retention,
            "push_to": self.push_to,
            "expires_with": self.expires_with,
        }
        if self.job is not None:
            each |= {"job_queue": self.job.queue, "job_id": self.job.id, "job": self.job.definition}
        return [part for name, value in each.items() if value for part in (name, value)]


NO_FOLLOW_UP = FollowUp()


@dataclass(frozen=True, slots=True)
class Once:
    """A name under which a request is accepted once, for as long as its stream is there."""

    key: str
    value: bytes
    """Says which request it was to whoever comes with the same name."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def encode(entry: Entry) -> bytes:
    """The entry as it is stored."""
    return _encode(entry)


def decode(raw: Sequence[RawEntry]) -> list[ReadEntry]:
    """Entries of a reply, unchecked: `Transcript.read` is how a log is read."""
    return [(entry_id.decode(), _entry(fields)) for entry_id, fields in raw]


def _entry(fields: dict[bytes, bytes]) -> Entry:
    entry: Entry = _decode(fields[FIELD])
    if isinstance(entry, Terminal) and SEALED_AT in fields:
        return msgspec.structs.replace(entry, at=int(fields[SEALED_AT]) / 1000)
    return entry
