"""The input: a file of requests, looked through before anything is sent."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import msgspec

from llmboost.cli.batch.options import STANDARD
from llmboost.cli.flags import UsageError

_BOM = b"\xef\xbb\xbf"
"""Some editors begin a file with it."""
_SHOWN = 10
"""So many mistakes are shown."""


class _Line(msgspec.Struct):
    """What is read of a line; the server checks the rest."""

    url: str = ""
    body: dict[str, msgspec.Raw] = {}


@dataclass(frozen=True, slots=True)
class Source:
    """An open input."""

    name: str
    file: BinaryIO
    lines: int
    endpoint: str
    """What the first line asks for, as is `model`."""
    model: str | None


@contextmanager
def opened(source: str) -> Iterator[Source]:
    """The input, looked through.

    Raises:
        UsageError: it can't be read, or a line is no JSON object; names the lines.
    """
    with _open(source) as file:
        name = "standard input" if source == STANDARD else source
        yield _look_through(name, file)


@contextmanager
def _open(source: str) -> Iterator[BinaryIO]:
    if source == STANDARD:
        # It is read twice at least: looked through, and sent, again if need be.
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
            copy.seek(0)
            yield cast(BinaryIO, copy)
        return
    try:
        file = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"input {source!r}: {error.strerror}") from None
    with file:
        yield file


def _look_through(name: str, file: BinaryIO) -> Source:
    first: _Line | None = None
    lines, mistakes = 0, []
    for number, text in enumerate(file, 1):
        if number == 1:
            text = text.removeprefix(_BOM)
        if not text.strip():
            continue
        lines += 1
        try:
            line = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            mistakes.append(f"{name}:{number}: {_explain(error)}")
            if len(mistakes) == _SHOWN:
                break
        else:
            first = first or line
    if mistakes:
        raise UsageError("; ".join(mistakes))
    if first is None:
        raise UsageError(f"{name} holds no line")
    file.seek(0)
    return Source(name, file, lines, first.url, _model(first))


def _model(line: _Line) -> str | None:
    try:
        return msgspec.json.decode(line.body["model"], type=str)
    except (KeyError, msgspec.DecodeError):
        return None


def _explain(error: Exception) -> str:
    if isinstance(error, msgspec.ValidationError):
        return f"no request of a batch: {error}"
    return f"not JSON: {error}"


def basename(source: str) -> str:
    """Name of the file that is uploaded."""
    return "input.jsonl" if source == STANDARD else Path(source).name


_decode = msgspec.json.Decoder(_Line).decode
