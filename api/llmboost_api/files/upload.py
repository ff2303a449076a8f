"""An upload on its way from the request to the storage: never whole in memory, and never on another disk."""

import difflib
import re
from collections.abc import AsyncIterable
from typing import Any

from fastapi import Request
from pydantic import ValidationError

from llmboost_api.body import declared_bytes
from llmboost_api.errors import ApiError
from llmboost_api.files.files import Draft, Files
from llmboost_api.files.multipart import MultipartError, MultipartReader, PartBegins, PartEnds
from llmboost_api.files.record import FileRecord
from llmboost_api.protocol.files import FileRequest
from llmboost_api.protocol.translate import first_error

FILE = "file"
PURPOSE = "purpose"
EXPIRES_AFTER = re.compile(r"expires_after\[(anchor|seconds)\]")
FIELDS = (FILE, PURPOSE, "expires_after[anchor]", "expires_after[seconds]")
MAX_FIELD_BYTES = 1024
MAX_FILENAME = 255
FORM_BYTES = 64 * 1024
"""What the form may add to the file."""


async def receive(request: Request, files: Files, asker: str, limit: int) -> FileRecord:
    """Stores the file that a form brings. If anything is wrong with it, nothing is left.

    Raises:
        ApiError: too large (413), encoded (415), or not the form that it should be (400).
        StorageError: it can't be stored.
        ClientDisconnect: the client left before it had sent everything.
    """
    if declared_bytes(request) > limit + FORM_BYTES:
        raise _too_large(limit)
    async with files.draft(asker) as draft:
        try:
            reader = MultipartReader(request.headers.get("content-type", ""))
            form = _Form(draft, limit)
            await form.take(reader, request.stream())
        except MultipartError as error:
            raise ApiError(
                400,
                f"The request body can't be read as a form with a file: {error}.",
                code="invalid_form",
            ) from None
        filename, asked = form.checked()
        return await draft.publish(filename, asked.purpose, asked.life_s())


class _Form:
    """What has come of a form."""

    def __init__(self, draft: Draft, limit: int) -> None:
        self._draft = draft
        self._limit = limit
        self._part: str | None = None
        """The field that is coming."""
        self._values: dict[str, bytearray] = {}
        self._filename: str | None = None

    async def take(self, reader: MultipartReader, pieces: AsyncIterable[bytes]) -> None:
        """Everything, to its end. Each piece is stored before the next is taken."""
        async for piece in pieces:
            for event in reader.feed(piece):
                match event:
                    case PartBegins():
                        self._begin(event)
                    case PartEnds():
                        self._part = None
                    case data:
                        await self._add(data)
        reader.finish()

    def checked(self) -> tuple[str, FileRequest]:
        """The file's name, and what else was asked.

        Raises:
            ApiError: a field is missing or wrong (400).
        """
        asked = _validate(self._fields())
        if self._filename is None:
            raise _refused(
                FILE, "is missing: add it to the form, with its name.", "missing_required_parameter"
            )
        return self._filename, asked

    def _begin(self, part: PartBegins) -> None:
        name = part.name
        if name not in FIELDS:
            closest = difflib.get_close_matches(name, FIELDS, 1, cutoff=0.75)
            hint = f"Did you mean '{closest[0]}'?" if closest else "Remove it from the form."
            raise _refused(name[:60], f"is not a field that this server knows. {hint}", "unknown_parameter")
        if name in self._values or (name == FILE and self._filename is not None):
            raise _refused(name, "is in the form twice: send it once, one file to a request.")
        self._part = name
        if name != FILE:
            self._values[name] = bytearray()
            return
        if part.filename is None:
            raise _refused(
                FILE, "must be a file: send it with a filename, as `curl -F file=@input.jsonl` does."
            )
        if len(part.filename) > MAX_FILENAME:
            raise _refused(FILE, f"has a name of more than {MAX_FILENAME} characters: choose a shorter one.")
        self._filename = part.filename
        if PURPOSE in self._values:  # A wrong one is told before the file has been taken in.
            _validate({PURPOSE: self._fields()[PURPOSE]})

    async def _add(self, data: bytes) -> None:
        assert self._part is not None
        if self._part == FILE:
            if self._draft.size + len(data) > self._limit:
                raise _too_large(self._limit)
            await self._draft.write(data)
            return
        value = self._values[self._part]
        value += data
        if len(value) > MAX_FIELD_BYTES:
            raise _refused(self._part, f"is longer than {MAX_FIELD_BYTES} bytes: shorten it.")

    def _fields(self) -> dict[str, Any]:
        """The fields as JSON would have them."""
        fields: dict[str, Any] = {}
        for name, value in self._values.items():
            text = value.decode("utf-8", "replace")
            within = EXPIRES_AFTER.fullmatch(name)
            if within is None:
                fields[name] = text
            else:
                number = within[1] == "seconds" and re.fullmatch(r"-?[0-9]{1,15}", text) is not None
                fields.setdefault("expires_after", {})[within[1]] = int(text) if number else text
        return fields


def _validate(fields: dict[str, Any]) -> FileRequest:
    try:
        return FileRequest.model_validate(fields)
    except ValidationError as invalid:
        raise first_error(invalid, FileRequest) from None


def _refused(param: str, why: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"'{param}' {why}", code=code, param=param)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"A file may have {limit} bytes; this one is larger. Split it, or have the operator raise "
        "--max-file-bytes.",
        code="file_too_large",
        param=FILE,
    )
