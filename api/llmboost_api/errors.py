"""Errors as a client sees them: OpenAI's error object, and when to send the request again."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from llmboost.entries import StreamError

NO_RETRY = {"x-should-retry": "false"}
"""Official clients send a request again after 408, 409, 429 and 5xx. Once a job is in the queue that
would generate twice, so every error from there on tells them not to."""

EVENT_STREAM = "text/event-stream"


class ApiError(Exception):
    """A request that ends in an error. The message says what was wrong, with what value, and what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def object(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        """The error as the JSON of a response."""
        return msgspec.json.encode({"error": self.object()})

    def frame(self) -> bytes:
        """The error in a stream of events. No `[DONE]` follows."""
        return b"data: " + self.body() + b"\n\n"

    def response(self) -> Response:
        """The error as an HTTP response."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def quoted(text: str) -> str:
    """What a client sent, in a message: enough of it to recognise."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def from_stream(error: StreamError) -> ApiError:
    """An error that a token stream ended in."""
    return ApiError(
        error.status, error.message, type=error.type, code=error.code, param=error.param, headers=NO_RETRY
    )


def unavailable(message: str) -> ApiError:
    """The pod cannot serve for the moment, and nothing was started: the client may try again."""
    return ApiError(
        503, message, type="server_error", code="service_unavailable", headers={"retry-after": "2"}
    )


def internal(request_id: str) -> ApiError:
    """Whatever nobody foresaw. The cause is in the log, under the request's id."""
    return ApiError(
        500,
        "Something failed inside the server. If it happens again, tell the operator the request id "
        f"{request_id}.",
        type="server_error",
        code="internal_error",
        headers=NO_RETRY,
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status == 503 and _is_event_source(request):
        # It gives up at any status but 200, and connects again when a stream ends.
        return Response(error.frame(), headers={"cache-control": "no-store"}, media_type=EVENT_STREAM)
    return error.response()


def _is_event_source(request: Request) -> bool:
    """Whether a browser's EventSource asks, or what behaves like one."""
    return request.method == "GET" and request.headers.get("accept") == EVENT_STREAM


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Routing's own errors."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    what: dict[str, Any] = {"code": None}
    message = str(error.detail)
    if error.status_code == 404:
        message = f"There is nothing at {path}. GET /openapi.json lists what there is."
        what["code"] = "unknown_url"
    elif error.status_code == 405:
        allowed = _methods(request)
        first = ", ".join(allowed[:-1])
        message = f"{path} does not take {method}: use {f'{first} or ' if first else ''}{allowed[-1]}."
        what |= {"code": "method_not_allowed", "headers": {"allow": ", ".join(allowed)}}
    return ApiError(error.status_code, message, **{"headers": error.headers, **what}).response()


def _methods(request: Request) -> list[str]:
    """All that this path takes. Starlette names those of the first of its routes only."""

    def takes(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT") if takes(method)]


def install(app: FastAPI) -> None:
    """Makes every error of the app an OpenAI-shaped one."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
