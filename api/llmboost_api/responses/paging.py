"""Which page of a response's input is wanted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query, Request
from pydantic import WithJsonSchema

from llmboost_api.errors import ApiError
from llmboost_api.responses.reading import INCLUDE, check_include
from llmboost_api.resume import refuse_unknown, shown

MOST, DEFAULT = 100, 20
"""OpenAI's."""
_PARAMETERS = {"after", "limit", "order", *INCLUDE}


@dataclass(frozen=True, slots=True)
class ItemsPage:
    """A page of items."""

    after: str | None
    limit: int
    newest_first: bool

    def of(self, items: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
        """Those of the items, oldest first, that are on it; and whether more follow.

        Raises:
            ApiError: the one that it begins behind is not there (400).
        """
        ordered = list(reversed(items)) if self.newest_first else list(items)
        start = 0
        if self.after is not None:
            ids = [item["id"] for item in ordered]
            if self.after not in ids:
                raise _refused("after", self.after, "the id of one of the response's input items")
            start = ids.index(self.after) + 1
        end = start + self.limit
        return ordered[start:end], end < len(ordered)


async def items_page(
    request: Request,
    after: Annotated[str | None, Query(description="Id of the item behind which the page begins.")] = None,
    limit: Annotated[
        str | None,
        Query(description="Items on the page at most."),
        WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MOST, "default": DEFAULT}),
    ] = None,
    order: Annotated[
        str | None,
        Query(description="`desc`: the last comes first."),
        WithJsonSchema({"type": "string", "enum": ["asc", "desc"], "default": "desc"}),
    ] = None,
) -> ItemsPage:
    """A dependency of routes.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    refuse_unknown(request, _PARAMETERS)
    check_include(request)
    if limit is not None and not (limit.isascii() and limit.isdecimal() and 1 <= int(limit[:9]) <= MOST):
        raise _refused("limit", limit, f"a number from 1 to {MOST}")
    if order not in (None, "asc", "desc"):
        raise _refused("order", order, "asc or desc")
    return ItemsPage(after, DEFAULT if limit is None else int(limit), order != "asc")


def _refused(param: str, given: str | None, wanted: str) -> ApiError:
    return ApiError(
        400, f"'{param}' is {shown(given or '')}, but it must be {wanted}.", code="invalid_value", param=param
    )
