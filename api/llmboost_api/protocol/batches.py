"""POST /v1/batches: what a client asks for, and how long it may take."""

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from llmboost_api.protocol.files import ExpiresAfter
from llmboost_api.protocol.form import ENDPOINTS
from llmboost_api.protocol.metadata import Metadata
from llmboost_api.protocol.request import RequestModel, problem
from llmboost_api.protocol.translate import shown

LONGEST_S = 30 * 24 * 3600
"""How long a batch may take at most."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_WINDOW = re.compile("([1-9][0-9]{0,7})([smhd])")
PATHS = tuple(endpoint.path for endpoint in ENDPOINTS)


def window_seconds(window: str) -> int:
    """Seconds of a completion window such as `24h`.

    Raises:
        ValueError: it is none.
    """
    match = _WINDOW.fullmatch(window)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 1 <= seconds <= LONGEST_S:
        raise ValueError(f"{window!r} is no completion window")
    return seconds


def _window(value: Any) -> str:
    if not isinstance(value, str):
        raise problem("invalid_type", f"must be a string such as '24h', not {shown(value)}.")
    try:
        window_seconds(value)
    except ValueError:
        raise problem(
            "invalid_value",
            f"is {shown(value)}, but it must be '24h', or another number of s, m, h or d: 1s to 30d.",
        ) from None
    return value


def _endpoint(value: Any) -> str:
    if value not in PATHS:
        raise problem("invalid_value", f"is {shown(value)}, but it must be one of {', '.join(PATHS)}.")
    return str(value)


class BatchRequest(RequestModel):
    """A file of requests, to be answered into another one."""

    input_file_id: str = Field(min_length=1, description="A file that was uploaded with purpose 'batch'.")
    endpoint: Annotated[
        str, BeforeValidator(_endpoint), WithJsonSchema({"type": "string", "enum": list(PATHS)})
    ] = Field(description="Of all lines of the file.")
    completion_window: Annotated[
        str, BeforeValidator(_window), WithJsonSchema({"type": "string", "pattern": "^[1-9][0-9]*[smhd]$"})
    ] = Field(description="Time after which what is not done is reported as expired: 1s to 30d.")
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = Field(
        None, description="When the files that it makes are to go; default: after 30 days."
    )
