"""A multipart body into its parts, as it comes: nothing is kept but what the next piece needs."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

# What it warns of is told to the client, whose mistake it is.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)

_PLAIN = ("", "7bit", "8bit", "binary")


class MultipartError(Exception):
    """The body is no multipart form; `str()` says why."""


@dataclass(frozen=True, slots=True)
class PartBegins:
    """A field of the form begins; its data follows, in any number of pieces."""

    name: str
    filename: str | None
    """None: it is a value, not a file."""


@dataclass(frozen=True, slots=True)
class PartEnds:
    """The field is whole."""


Event = PartBegins | bytes | PartEnds


class MultipartReader:
    """Takes the body of a request in pieces of any size, gives what it holds as events.

    Raises:
        MultipartError: the content type is another, or names no boundary.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data":
            shown = content_type[:100] or "none"
            raise MultipartError(f"its content type must be multipart/form-data, not {shown!r}")
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise MultipartError("its content type names no boundary")
        self._events: list[Event] = []
        self._headers: dict[bytes, bytes] = {}
        self._header = bytearray()
        self._value = bytearray()
        self._begun = self._whole = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": lambda: self._events.append(PartEnds()),
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise MultipartError("the boundary that its content type names is too long") from None

    def feed(self, piece: bytes) -> Iterator[Event]:
        """What this piece brings.

        Raises:
            MultipartError: it can't be the next piece of a form.
        """
        if not self._begun:
            # The parser would skip what follows a line break here, as far as it comes in the same piece.
            piece = piece.lstrip(b"\r\n")
            self._begun = bool(piece)
        try:
            self._parser.write(piece)
        except FormParserError as error:
            reason = str(error)
            raise MultipartError(f"{reason[:1].lower()}{reason[1:]}") from None
        finally:
            events, self._events = self._events, []
        yield from events

    def finish(self) -> None:
        """There are no more pieces.

        Raises:
            MultipartError: the form is not whole.
        """
        if not self._whole:
            raise MultipartError("it breaks off before the last boundary")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise MultipartError("a part of it has no `Content-Disposition: form-data` with a name")
        encoding = self._headers.get(b"content-transfer-encoding", b"").decode("latin-1").strip().lower()
        if encoding not in _PLAIN:
            raise MultipartError(
                f"a part of it has the transfer encoding {encoding[:60]!r}: send it as it is"
            )
        filename = options.get(b"filename")
        self._events.append(PartBegins(_text(name), None if filename is None else _text(filename)))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(data[start:end])

    def _on_end(self) -> None:
        self._whole = True


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
