"""Request bodies: read within a bound, parsed strictly, checked against a model. The one way in."""

import json
import re
from typing import Any, NoReturn, TypeVar

import msgspec
from fastapi import Request
from pydantic import ValidationError

from llmboost_api.errors import ApiError
from llmboost_api.protocol.request import RequestModel
from llmboost_api.protocol.translate import first_error

M = TypeVar("M", bound=RequestModel)

_SURROGATE = re.compile("[\ud800-\udfff]")


async def read(request: Request, model: type[M], limit: int) -> M:
    """The request's body as `model`.

    Raises:
        ApiError: too large (413), encoded (415), not JSON, or not what the model takes (400).
        ClientDisconnect: the client left before it had sent everything.
    """
    return check(await receive(request, limit), model)


async def receive(request: Request, limit: int) -> dict[str, Any]:
    """The request's body as a JSON object. Its content type is not looked at: what parses is JSON.

    Raises:
        ApiError: too large (413), encoded (415), or not JSON (400).
        ClientDisconnect: the client left before it had sent everything.
    """
    return parse(await _read_bytes(request, limit))


def check(data: dict[str, Any], model: type[M]) -> M:
    """A JSON object as `model`.

    Raises:
        ApiError: it is not what the model takes (400).
    """
    try:
        return model.model_validate(data)
    except ValidationError as invalid:
        raise first_error(invalid, model) from None


def declared_bytes(request: Request) -> int:
    """How long the body is by its head; 0 if that does not say.

    Raises:
        ApiError: the body is compressed, or otherwise not as it is (415).
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise ApiError(415, f"Content-Encoding {encoding!r} is not supported: send the body as it is.")
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else 0


async def _read_bytes(request: Request, limit: int) -> bytes:
    declared = declared_bytes(request)
    if declared > limit:
        raise _too_large(limit, f"has {declared}")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit, "is larger")
    return bytes(body)


def _too_large(limit: int, what: str) -> ApiError:
    return ApiError(
        413,
        f"A request body may have {limit} bytes; this one {what}. Send less, "
        "or have the operator raise --max-request-bytes.",
        code="request_too_large",
    )


def parse(body: bytes) -> dict[str, Any]:
    """A JSON object, by the letter of RFC 8259: no NaN, no lone surrogates.

    Raises:
        ApiError: 400, says where it is not one.
    """
    try:
        return parse_object(body)
    except Malformed as malformed:
        raise ApiError(
            400, f"The request body can't be read as JSON: {malformed}.", code="invalid_json"
        ) from None


def parse_object(text: bytes) -> dict[str, Any]:
    """As `parse`, of any text.

    Raises:
        Malformed: it is no such object.
    """
    if not text.strip():
        raise Malformed("it is empty; send a JSON object")
    try:
        data = msgspec.json.decode(text)
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _diagnose(text, error)
    if not isinstance(data, dict):
        raise Malformed('it must be an object, such as {"model": …}')
    return data


class Malformed(Exception):
    """What should be a JSON object is none; `str()` says why."""


def _diagnose(body: bytes, error: Exception) -> NoReturn:
    """Finds out, slowly, what is wrong: the fast parser names lone surrogates as something else."""
    try:
        text = body.decode()
    except UnicodeDecodeError as bad:
        raise Malformed(f"byte {bad.start} is not UTF-8 (a lone surrogate, or another encoding)") from None

    def refuse_constant(name: str) -> NoReturn:
        raise Malformed(f"{name} is not a JSON number")

    try:
        surrogate = _find_surrogate(json.loads(text, parse_constant=refuse_constant))
    except json.JSONDecodeError as bad:
        raise Malformed(f"{bad.msg} at line {bad.lineno}, column {bad.colno}") from None
    except RecursionError:
        raise Malformed("it is nested too deeply") from None
    except ValueError:  # an integer of thousands of digits
        raise Malformed("it holds a number out of range") from None
    if surrogate is not None:
        raise Malformed(
            f"a string holds the lone surrogate \\u{ord(surrogate):04x}, which is no character; "
            "send surrogates in pairs, or the character itself in UTF-8"
        )
    raise Malformed(str(error))


def _find_surrogate(value: Any) -> str | None:
    """The first lone surrogate in any string of parsed JSON, keys included."""
    match = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
    return match.group() if match else None
