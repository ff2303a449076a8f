"""How a response is asked for again: as it stands or as a stream, and behind which of its events."""

import re
from dataclasses import dataclass
from typing import Annotated, get_args

from fastapi import Header, Query, Request
from pydantic import WithJsonSchema

from llmboost_api.errors import ApiError, quoted
from llmboost_api.protocol.responses.request import Includable
from llmboost_api.resume import HEADER, QUERY, boolean, last_had, refuse_unknown, refused

_INCLUDE = {"include", "include[]"}
"""Official clients write lists with brackets."""
_OBFUSCATION = "include_obfuscation"
_PARAMETERS = {"stream", QUERY, _OBFUSCATION, *_INCLUDE}
_NUMBER = re.compile("-1|0|[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class Place:
    """The last event that a client has had, and where its request says so."""

    number: int
    param: str

    def refused(self, why: str) -> ApiError:
        """A 400 that names the parameter and its value."""
        return refused(self.param, str(self.number), why)


@dataclass(frozen=True, slots=True)
class EventReading:
    """What of a response is wanted."""

    stream: bool
    after: Place | None


async def event_reading(
    request: Request,
    stream: Annotated[
        str | None,
        Query(description="The events, and not the response as it stands."),
        WithJsonSchema({"type": "boolean"}),
    ] = None,
    starting_after: Annotated[
        str | None,
        Query(description="With `stream`: `sequence_number` of the last event received. The rest follows."),
        WithJsonSchema({"type": "integer"}),
    ] = None,
    include_obfuscation: Annotated[str | None, Query(), WithJsonSchema({"type": "boolean"})] = None,
    last_event_id: Annotated[
        str | None,
        Header(alias=HEADER, description="The same, and wins over it: what a browser's EventSource sends."),
    ] = None,
) -> EventReading:
    """A dependency of routes.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    refuse_unknown(request, _PARAMETERS)
    _check_include(request)
    if include_obfuscation is not None and boolean(_OBFUSCATION, include_obfuscation):
        raise ApiError(
            400,
            f"'{_OBFUSCATION}' is true, but this server does not pad its events: an event is the same bytes "
            "each time. Leave it out.",
            code="unsupported_value",
            param=_OBFUSCATION,
        )
    streamed = stream is not None and boolean("stream", stream)
    after = _place(last_event_id, starting_after)
    if after is not None and not streamed:
        raise after.refused("that is only for streams. Add ?stream=true, or leave it out.")
    return EventReading(streamed, after)


def _check_include(request: Request) -> None:
    """What a response holds was settled when it was made, so this adds nothing.

    Raises:
        ApiError: it names what no response has (400).
    """
    for name in _INCLUDE:
        for given in request.query_params.getlist(name):
            if given not in get_args(Includable):
                raise ApiError(
                    400,
                    f"'include' has {quoted(given)}; known are {', '.join(get_args(Includable))}.",
                    code="invalid_value",
                    param="include",
                )


def _place(last_event_id: str | None, starting_after: str | None) -> Place | None:
    param, number = last_had(last_event_id, starting_after)
    if not number:
        return None
    if not _NUMBER.fullmatch(number):
        raise refused(param, number, "it must be the sequence_number of an event, a whole number such as 7.")
    return Place(int(number), param)
