"""What flags of `llmboost bench` hold: numbers, ranges, lists."""

import json
import math
from dataclasses import dataclass
from typing import Any, overload
from urllib.parse import urlsplit

from llmboost.cli.flags import UsageError

LATENCIES = ("ttft", "itl", "tpot", "e2e")


@dataclass(frozen=True, slots=True)
class Span:
    """From `least` to `most`, both included."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: so many at a time, or so many a second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        return f"{self.rate:g}/s" if self.rate is not None else str(self.concurrency)


def url(text: str) -> str:
    """The URL under which the endpoints are; `/v1` where only a host is named."""
    if "://" not in text:
        text = f"http://{text}"
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"URL {text!r}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"URL {text!r} must be such as http://localhost:8011/v1")
    text = text.rstrip("/")
    for endpoint in ("/chat/completions", "/completions"):
        text = text.removesuffix(endpoint)
    return text if urlsplit(text).path.strip("/") else f"{text}/v1"


def integer(flag: str, text: str) -> int:
    """Raises `UsageError`, as all of these do."""
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} {text!r} must be a whole number") from None


@overload
def count(flag: str, text: str, least: int = 1) -> int: ...
@overload
def count(flag: str, text: str | None, least: int = 1) -> int | None: ...
def count(flag: str, text: str | None, least: int = 1) -> int | None:
    """A whole number from `least` on; None for what isn't given."""
    if text is None:
        return None
    value = integer(flag, text)
    if value < least:
        raise UsageError(f"{flag} {text!r} must be {least} or more")
    return value


@overload
def number(flag: str, text: str | None, default: float) -> float: ...
@overload
def number(flag: str, text: str | None, default: None) -> float | None: ...
def number(flag: str, text: str | None, default: float | None) -> float | None:
    """A number above 0; the default for what isn't given."""
    if text is None:
        return default
    value = _float(flag, text)
    if value <= 0:
        raise UsageError(f"{flag} {text!r} must be above 0")
    return value


def span(flag: str, text: str) -> Span:
    """`N`, or `MIN-MAX`."""
    least, dash, most = text.partition("-")
    if not least.isdecimal() or (dash and not most.isdecimal()) or int(least) < 1:
        raise UsageError(f"{flag} {text!r} must be a number of tokens, or a range of them such as 16-256")
    if dash and int(most) < int(least):
        raise UsageError(f"{flag} {text!r} goes from more to less: {most}-{least} is meant")
    return Span(int(least), int(most or least))


def counts(flag: str, text: str) -> list[int]:
    """`N,N,...`"""
    return [count(flag, part) for part in _parts(flag, text)]


def rates(flag: str, text: str) -> list[float]:
    """`R,R,...`"""
    return [number(flag, part, 1.0) for part in _parts(flag, text)]


def temperatures(flag: str, text: str) -> tuple[float, ...]:
    """`T,T,...`"""
    found = tuple(_float(flag, part) for part in _parts(flag, text))
    for value in found:
        if not 0 <= value <= 2:  # else the server refuses the value, and it would look as if it did the field
            raise UsageError(f"{flag} {text!r} must be from 0 to 2")
    return found


def json_object(flag: str, text: str | None) -> dict[str, Any] | None:
    """A JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f'{flag} {text!r} must be a JSON object, such as {{"top_p": 0.9}}')
    return value


def slo(flag: str, text: str | None) -> dict[str, float] | None:
    """`ttft:200,tpot:50`: milliseconds by latency."""
    if text is None:
        return None
    limits = {}
    for part in _parts(flag, text):
        name, colon, most = part.partition(":")
        if not colon or name not in LATENCIES:
            raise UsageError(
                f"{flag} {part!r} must be one of {', '.join(LATENCIES)}, a colon and milliseconds: ttft:200"
            )
        limits[name] = number(flag, most, 0.0)
    return limits


def _parts(flag: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} {text!r} must be a value, or several with commas between them")
    return parts


def _float(flag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{flag} {text!r} must be a number")
    return value
