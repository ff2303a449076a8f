"""Which page of a list of files is wanted."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Query, Request
from pydantic import WithJsonSchema

from llmboost_api.errors import ApiError
from llmboost_api.files.files import is_file_id
from llmboost_api.resume import shown

MOST = 10_000
_PARAMETERS = {"after", "limit", "order", "purpose"}


@dataclass(frozen=True, slots=True)
class Listing:
    """A page."""

    after: str | None
    limit: int
    newest_first: bool
    purpose: str | None


async def listing(
    request: Request,
    after: Annotated[str | None, Query(description="Id of the file behind which the page begins.")] = None,
    limit: Annotated[
        str | None,
        Query(description="Files on the page at most."),
        WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MOST, "default": MOST}),
    ] = None,
    order: Annotated[
        str | None,
        Query(description="By the time of their making."),
        WithJsonSchema({"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
    ] = None,
    purpose: Annotated[str | None, Query(description="Only files with this purpose.")] = None,
) -> Listing:
    """A dependency of routes.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    for name in sorted(request.query_params.keys() - _PARAMETERS):
        raise ApiError(
            400,
            f"{shown(name)} is not a parameter that this server knows. Remove it from the URL.",
            code="unknown_parameter",
            param=name[:60],
        )
    if limit is not None and not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MOST):
        raise _refused("limit", limit, f"a number from 1 to {MOST}")
    if order not in (None, "asc", "desc"):
        raise _refused("order", order, "asc or desc")
    if after is not None and not is_file_id(after):
        raise _refused("after", after, "the id of a file")
    return Listing(after, MOST if limit is None else int(limit), order != "asc", purpose)


def _refused(param: str, given: str | None, wanted: str) -> ApiError:
    return ApiError(
        400, f"'{param}' is {shown(given or '')}, but it must be {wanted}.", code="invalid_value", param=param
    )
