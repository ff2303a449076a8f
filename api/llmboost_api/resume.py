"""How a completion is asked for again: whole or as a stream, and where in the stream to go on."""

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated

from fastapi import Header, Query, Request
from pydantic import WithJsonSchema

from llmboost.frames import Cursor
from llmboost_api.errors import ApiError, quoted

HEADER = "Last-Event-ID"
QUERY = "starting_after"
_PARAMETERS = {"stream", QUERY}
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """The last frame that a client has had, and where its request says so."""

    frame_id: str
    cursor: Cursor
    param: str

    def refused(self, why: str) -> ApiError:
        """A 400 that names the parameter and its value."""
        return refused(self.param, self.frame_id, why)

    def not_found(self) -> ApiError:
        """There is no such frame."""
        return self.refused(
            "no frame of this stream has that id. Give the id of the last frame received, "
            "or leave it out to get the stream from its beginning."
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """What of a completion is wanted."""

    stream: bool
    after: ResumePoint | None


async def reading(
    request: Request,
    stream: Annotated[
        str | None,
        Query(description="The stream, and not the whole answer at its end."),
        WithJsonSchema({"type": "boolean"}),
    ] = None,
    starting_after: Annotated[
        str | None, Query(description="With `stream`: the id of the last frame received. The rest follows.")
    ] = None,
    last_event_id: Annotated[
        str | None,
        Header(alias=HEADER, description="The same, and wins over it: what a browser's EventSource sends."),
    ] = None,
) -> Reading:
    """A dependency of routes.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    refuse_unknown(request, _PARAMETERS)
    streamed = stream is not None and boolean("stream", stream)
    after = _resume_point(last_event_id, starting_after)
    if after is not None and not streamed:
        raise after.refused("that is only for streams. Add ?stream=true, or leave it out.")
    return Reading(streamed, after)


def refuse_unknown(request: Request, known: Set[str]) -> None:
    """Raises:
    ApiError: the URL has a parameter that is not among these (400).
    """
    for name in sorted(request.query_params.keys() - known):
        raise ApiError(
            400,
            f"{quoted(name)} is not a parameter that this server knows. Remove it from the URL.",
            code="unknown_parameter",
            param=name[:60],
        )


async def beginning(
    request: Request,
    last_event_id: Annotated[str | None, Header(alias=HEADER, include_in_schema=False)] = None,
) -> None:
    """A dependency of routes that begin an answer. Some libraries connect again by sending the request again.

    Raises:
        ApiError: the client believes that it goes on with one, and would take the new one for the rest (400).
    """
    if last_event_id:
        raise refused(
            HEADER,
            last_event_id,
            f"a POST begins a new answer. To go on with the one that broke off, GET {request.url.path}/{{id}}"
            "?stream=true with this header, where id is the one in each of its chunks.",
        )


def boolean(param: str, given: str) -> bool:
    """A query parameter's value.

    Raises:
        ApiError: it is none (400).
    """
    value = _BOOLEANS.get(given.lower())
    if value is None:
        message = f"'{param}' is {quoted(given)}, but it must be true or false."
        raise ApiError(400, message, code="invalid_value", param=param)
    return value


def _resume_point(last_event_id: str | None, starting_after: str | None) -> ResumePoint | None:
    param, frame_id = last_had(last_event_id, starting_after)
    if not frame_id:
        return None
    cursor = Cursor.parse(frame_id)
    if cursor is None:
        raise refused(param, frame_id, "ids of frames look like 1-7 or 1-7.2. Give one as it was received.")
    return ResumePoint(frame_id, cursor, param)


def last_had(last_event_id: str | None, starting_after: str | None) -> tuple[str, str]:
    """(parameter, value) that says what a client has had last; the value is empty if it says nothing.

    The header wins: an EventSource sends it when it connects again, to the URL that it was made with.
    """
    return (HEADER, last_event_id) if last_event_id else (QUERY, starting_after or "")


def refused(param: str, value: str, why: str) -> ApiError:
    """A stream can't go on from there: a 400 that names the parameter and its value."""
    return ApiError(400, f"'{param}' is {quoted(value)}: {why}", code="invalid_cursor", param=param)
