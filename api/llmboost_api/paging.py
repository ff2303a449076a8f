"""OpenAI's lists: pages that follow one another by the id of the last entry seen."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import Field, ValidationError

from llmboost_api.protocol.request import RequestModel
from llmboost_api.protocol.translate import first_error

Order = Literal["asc", "desc"]
_NESTED = re.compile(r"(\w+)\[([^\]]+)\]")


class Paging(RequestModel):
    """The query of a list; a list may have more to its own, or other bounds."""

    limit: int = Field(20, ge=1, le=100, description="Entries of a page.")
    after: str | None = Field(None, description="Id of the last entry seen: the page begins behind it.")
    order: Order = Field("desc", description="By time: oldest or newest first.")


P = TypeVar("P", bound=RequestModel)


def query_of(request: Request, model: type[P]) -> P:
    """The request's query as `model`; `a[b]=c` is an object, as OpenAI's clients write it.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    query: dict[str, Any] = {}
    for name, value in request.query_params.items():
        if nested := _NESTED.fullmatch(name):
            query.setdefault(nested[1], {})[nested[2]] = value
        else:
            query[name] = value
    try:
        return model.model_validate(query, strict=False)
    except ValidationError as invalid:
        raise first_error(invalid, model) from None


def page_of(entries: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """OpenAI's list object: the first `limit` of the entries, which have ids, and whether there are more."""
    page = list(entries[:limit])
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(entries) > limit,
    }
