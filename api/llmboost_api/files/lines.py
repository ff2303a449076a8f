"""Bytes into lines, in constant memory however long a line is."""

from collections.abc import Iterator
from typing import NamedTuple

MAX_LINE_BYTES = 8 * 1024 * 1024


class Line(NamedTuple):
    """One line of a file."""

    number: int
    """From 1."""
    offset: int
    """Where in the file it begins."""
    end: int
    """Where the next one begins."""
    data: bytes | None
    """Without its line break (`\\n` or `\\r\\n`); None if it is too long to be held."""


class Splitter:
    """Takes a file in pieces of any size and gives its lines.

    A line break at the end of the file ends its last line, and begins none.
    """

    def __init__(self, *, offset: int = 0, number: int = 1, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_bytes
        self._number = number
        self._begin = self._end = offset
        self._held = bytearray()
        """Of a line whose end has not come; no more than is needed to know that it is too long."""

    def feed(self, piece: bytes) -> Iterator[Line]:
        """The lines that end in this piece."""
        start = 0
        while (stop := piece.find(b"\n", start)) >= 0:
            self._take(piece, start, stop)
            self._end += 1
            yield self._line()
            start = stop + 1
        self._take(piece, start, len(piece))

    def finish(self) -> Iterator[Line]:
        """The last line, if the file does not end in a line break."""
        if self._end > self._begin:
            yield self._line()

    def _take(self, piece: bytes, start: int, stop: int) -> None:
        room = self._max + 2 - len(self._held)  # a `\r` may come, and one more byte tells that it is too long
        self._held += memoryview(piece)[start : min(stop, start + room)]
        self._end += stop - start

    def _line(self) -> Line:
        data: bytes | None = bytes(self._held.removesuffix(b"\r"))
        if data is not None and len(data) > self._max:
            data = None
        line = Line(self._number, self._begin, self._end, data)
        self._held.clear()
        self._begin = self._end
        self._number += 1
        return line
