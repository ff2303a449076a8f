"""OpenAI's lists: pages that follow one another by the id of the last entry seen."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import Field, ValidationError

from llmboost_api.errors import ApiError, quoted
from llmboost_api.protocol.request import RequestModel
from llmboost_api.protocol.translate import first_error

Order = Literal["asc", "desc"]
_NESTED = re.compile(r"(\w+)\[(.*)\]", re.DOTALL)


class Paging(RequestModel):
    """The query of a list; a list may have more to its own, or other bounds."""

    limit: int = Field(20, ge=1, le=100, description="Entries of a page.")
    after: str | None = Field(None, description="Id of the last entry seen: the page begins behind it.")


class OrderedPaging(Paging):
    """The query of a list that can be had from either end."""

    order: Order = Field("desc", description="By time: oldest or newest first.")


P = TypeVar("P", bound=RequestModel)


def query_of(request: Request, model: type[P]) -> P:
    """The request's query as `model`; as OpenAI's clients write them, `a[b]=c` is an object, `a[]=c` a list.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    try:
        return model.model_validate(_fields(request), strict=False)
    except ValidationError as invalid:
        raise first_error(invalid, model) from None


def _fields(request: Request) -> dict[str, Any]:
    query: dict[str, Any] = {}
    for name, value in request.query_params.multi_items():
        nested = _NESTED.fullmatch(name)
        field, key = (name, None) if nested is None else nested.groups()
        given = query.setdefault(field, value if key is None else {} if key else [])
        if key is None and isinstance(given, str):
            query[field] = value
        elif key and isinstance(given, dict):
            given[key] = value
        elif key == "" and isinstance(given, list):
            given.append(value)
        else:
            raise ApiError(
                400,
                f"'{field}' is given in two ways: as a value, a list or an object. Give it in one.",
                code="invalid_value",
                param=field,
            )
    return query


def invalid_after(after: str, wanted: str) -> ApiError:
    """The page is to begin behind something that is not `wanted`."""
    return ApiError(
        400, f"'after' is {quoted(after)}, but it must be {wanted}.", code="invalid_value", param="after"
    )


def page_object(entries: Sequence[Mapping[str, Any]], *, more: bool) -> dict[str, Any]:
    """OpenAI's list object; the entries have ids."""
    return {
        "object": "list",
        "data": list(entries),
        "first_id": entries[0]["id"] if entries else None,
        "last_id": entries[-1]["id"] if entries else None,
        "has_more": more,
    }


def page_of(entries: Sequence[Mapping[str, Any]], wanted: OrderedPaging, kind: str) -> dict[str, Any]:
    """The wanted page of a list that is short; `entries` are the oldest first.

    Raises:
        ApiError: the one that it begins behind is none of them (400).
    """
    ordered = list(reversed(entries)) if wanted.order == "desc" else list(entries)
    start = 0
    if wanted.after is not None:
        ids = [entry["id"] for entry in ordered]
        if wanted.after not in ids:
            raise invalid_after(wanted.after, f"the id of one of its {kind}")
        start = ids.index(wanted.after) + 1
    end = start + wanted.limit
    return page_object(ordered[start:end], more=end < len(ordered))
