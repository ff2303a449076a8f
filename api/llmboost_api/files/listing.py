"""Which page of a list of files is wanted."""

from fastapi import Request
from pydantic import Field

from llmboost_api.files.files import is_file_id
from llmboost_api.paging import OrderedPaging, invalid_after, query_of

MOST = 10_000


class Listing(OrderedPaging):
    """The query of a list of files."""

    limit: int = Field(MOST, ge=1, le=MOST, description="Files of a page.")
    purpose: str | None = Field(None, description="Only files with this purpose.")


async def listing(request: Request) -> Listing:
    """A dependency of routes.

    Raises:
        ApiError: a parameter is unknown or wrong (400).
    """
    wanted = query_of(request, Listing)
    if wanted.after is not None and not is_file_id(wanted.after):
        raise invalid_after(wanted.after, "the id of a file")
    return wanted
