"""One line of a batch's input: a request in an envelope. What is wrong with one is told with its number."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmboost_api.batches.record import Problem
from llmboost_api.body import Malformed, parse_object
from llmboost_api.files.lines import Line
from llmboost_api.protocol.form import Endpoint
from llmboost_api.protocol.translate import shown

BOM = b"\xef\xbb\xbf"
"""Some editors begin a file with it."""
MAX_CUSTOM_ID = 512
_FIELDS = {"custom_id", "method", "url", "body"}


class LineRefused(Exception):
    """The line is no request of this batch."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A line that is a request, whose body nobody has looked at yet."""

    number: int
    custom_id: str
    body: dict[str, Any]


def is_blank(line: Line) -> bool:
    """Whether there is nothing in it."""
    return line.data is not None and not line.data.removeprefix(BOM if line.number == 1 else b"").strip()


def read_line(line: Line, endpoint: Endpoint, max_bytes: int) -> LineRequest:
    """The request in a line.

    Raises:
        LineRefused: it is none, or not one for this endpoint.
    """

    def refused(code: str, why: str, param: str | None = None) -> LineRefused:
        return LineRefused(Problem(code, f"Line {line.number}: {why}", line.number, param))

    if line.data is None:
        raise refused(
            "line_too_long",
            f"it is longer than {max_bytes} bytes. Send less, "
            "or have the operator raise --max-request-bytes.",
        )
    try:
        data = parse_object(line.data.removeprefix(BOM) if line.number == 1 else line.data)
    except Malformed as malformed:
        raise refused("invalid_json_line", f"it can't be read as JSON: {malformed}.") from None
    if unknown := data.keys() - _FIELDS:
        name = min(unknown)
        raise refused(
            "unknown_parameter", f"{shown(name)} is not a field of a batch's line: remove it.", name[:60]
        )
    for name in ("custom_id", "method", "url", "body"):
        if data.get(name) is None:
            raise refused("missing_required_parameter", f"'{name}' is missing: add it.", name)
    if problem := _wrong(data, endpoint):
        raise refused(*problem)
    return LineRequest(line.number, data["custom_id"], data["body"])


def _wrong(data: Mapping[str, Any], endpoint: Endpoint) -> tuple[str, str, str] | None:
    """(code, reason, field) of what a line should not have."""
    custom_id, method, url, body = data["custom_id"], data["method"], data["url"], data["body"]
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        return (
            "invalid_custom_id",
            f"'custom_id' is {shown(custom_id)}, but it must be a string of 1 to {MAX_CUSTOM_ID} characters.",
            "custom_id",
        )
    if method != "POST":
        return "invalid_method", f"'method' is {shown(method)}, but it must be POST.", "method"
    if url != endpoint.path:
        return (
            "invalid_url",
            f"'url' is {shown(url)}, but the endpoint of this batch is {endpoint.path}.",
            "url",
        )
    if not isinstance(body, dict):
        return "invalid_type", f"'body' must be an object, not {shown(body)}.", "body"
    if body.get("stream"):
        return (
            "unsupported_value",
            "'body.stream' is set, but a batch has no streams: remove it.",
            "body.stream",
        )
    return None
