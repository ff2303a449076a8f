"""What wraps every request: its id, the net for errors that nobody foresaw, and what browsers ask for."""

import logging
from collections.abc import Sequence

from fastapi import FastAPI
from sse_starlette.sse import SendTimeoutError
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmboost.jobs import new_id
from llmboost_api import errors

logger = logging.getLogger(__name__)

READABLE_HEADERS = ("x-request-id", "x-should-retry", "retry-after")
"""Response headers that a page of another origin may read. OpenAI's JavaScript client decides by the last two
whether it sends a request again."""


def request_id(request: HTTPConnection) -> str:
    """The id under which this request is logged and answered."""
    return str(request.scope["state"]["request_id"])


def rename_request(request: HTTPConnection, name: str) -> None:
    """Gives the request the id of the completion that it asks for."""
    request.scope["state"]["request_id"] = name


class RequestContext:
    """Sends `x-request-id` with every response; logs an unforeseen error once, and answers it with a 500.

    Inside Starlette's own net, which would raise the error again for the server to log a second time.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = new_id("req")
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                header = (b"x-request-id", state["request_id"].encode())
                message["headers"] = [*message["headers"], header]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            logger.debug("client left: request_id=%s", state["request_id"])
        except SendTimeoutError:
            # The kernel is about to end the connection; uvicorn would report a response without an end.
            while (await receive())["type"] != "http.disconnect":
                pass
        except Exception:
            logger.exception(
                "internal error: request_id=%s method=%s path=%r",
                state["request_id"],
                scope["method"],
                scope["path"],
            )
            if not started:
                await errors.internal(state["request_id"]).response()(scope, receive, send_with_id)


def allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Lets pages of these origins use the API from a browser (CORS).

    A browser asks before it sends a request with a header such as `Authorization`, and asks without it: the
    question is answered here, before anyone looks for a key. All headers are allowed, because clients send
    some of their own (`x-stainless-*`); cookies are not, because nothing here depends on one.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=READABLE_HEADERS,
        )
