"""POST and GET /v1/files, GET and DELETE /v1/files/{id}, GET /v1/files/{id}/content."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field

from llmboost_api import openapi
from llmboost_api.auth import Asker
from llmboost_api.errors import NO_RETRY, ApiError, quoted
from llmboost_api.files.files import is_file_id
from llmboost_api.files.record import FileRecord
from llmboost_api.files.storage import NoSuchObject
from llmboost_api.files.upload import receive
from llmboost_api.paging import OrderedPaging, invalid_after, page_object, query_of
from llmboost_api.pod import Pod, pod_of
from llmboost_api.protocol.files import FORM

router = APIRouter(prefix="/v1", tags=["files"])

MOST = 10_000


class Listing(OrderedPaging):
    """Which files are wanted."""

    limit: int = Field(MOST, ge=1, le=MOST, description="Files of a page.")
    purpose: str | None = Field(None, description="Only files with this purpose.")


@router.post("/files", openapi_extra=openapi.form_of(FORM), responses=openapi.OBJECT)
async def create_file(request: Request, asker: Asker) -> dict[str, Any]:
    """Takes in a file."""
    pod = pod_of(request)
    record = await receive(request, pod.files, asker, pod.settings.max_file_bytes)
    return record.to_object()


@router.get("/files", openapi_extra=openapi.query_of(Listing), responses=openapi.OBJECT)
async def list_files(request: Request, asker: Asker) -> dict[str, Any]:
    """The key's files, page by page."""
    wanted = query_of(request, Listing)
    if wanted.after is not None and not is_file_id(wanted.after):
        raise invalid_after(wanted.after, "the id of a file")
    records, more = await pod_of(request).files.page(
        asker,
        after=wanted.after,
        limit=wanted.limit,
        newest_first=wanted.order == "desc",
        purpose=wanted.purpose,
    )
    return page_object([record.to_object() for record in records], more=more)


@router.get("/files/{file_id}", responses=openapi.OBJECT)
async def retrieve_file(request: Request, file_id: str, asker: Asker) -> dict[str, Any]:
    """What is known of a file."""
    return (await _find(pod_of(request), asker, file_id)).to_object()


@router.get("/files/{file_id}/content", responses=openapi.CONTENT, response_class=Response)
async def retrieve_file_content(request: Request, file_id: str, asker: Asker) -> Response:
    """Its bytes."""
    pod = pod_of(request)
    record = await _find(pod, asker, file_id)
    pieces = pod.files.read(record)
    try:
        # Before the headers go out, so that a storage that fails is a proper error.
        first = await anext(pieces, b"")
    except NoSuchObject:
        raise ApiError(
            500,
            f"The bytes of the file {file_id} are lost: the storage has no such object. Upload it again.",
            type="server_error",
            code="file_lost",
            headers=NO_RETRY,
        ) from None
    headers = {"content-length": str(record.bytes), "content-disposition": _attachment(record.filename)}
    return StreamingResponse(_content(first, pieces), headers=headers, media_type="application/octet-stream")


@router.delete("/files/{file_id}", responses=openapi.OBJECT)
async def delete_file(request: Request, file_id: str, asker: Asker) -> dict[str, Any]:
    """Removes a file."""
    if not await pod_of(request).files.delete(asker, file_id):
        raise _unknown(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


async def _find(pod: Pod, asker: str, file_id: str) -> FileRecord:
    """One of the asker's files.

    Raises:
        ApiError: there is none (404), or Redis can't be asked (503).
    """
    record = await pod.files.get(asker, file_id)
    if record is None:
        raise _unknown(file_id)
    return record


def _unknown(file_id: str) -> ApiError:
    """Also if it is another key's: whether there is one is nobody else's business."""
    return ApiError(
        404,
        f"There is no file {quoted(file_id)} here. Check the id: the file may have expired or been deleted, "
        "and only the API key that made it can see it.",
        code="file_not_found",
        param="file_id",
    )


async def _content(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        if first:
            yield first
        async for piece in rest:
            yield piece


def _attachment(filename: str) -> str:
    """A file to be saved; its name in RFC 8187's form if it is more than plain ASCII."""
    quoted = quote(filename, safe="")
    if quoted == filename:
        return f'attachment; filename="{filename}"'
    return f"attachment; filename*=utf-8''{quoted}"
