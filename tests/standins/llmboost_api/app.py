"""A pod that knows how it is, and batches that need no model: what others see of a real one, without its
imports."""

import uvicorn
from batches import FakeBatches
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import Receive, Scope, Send

from llmboost.readiness import live_workers
from llmboost.settings import ApiSettings


def run(settings: ApiSettings) -> None:
    async def ready(request: Request) -> Response:
        workers = await live_workers(settings.redis_url or "")
        return PlainTextResponse("ready", status_code=200 if workers else 503)

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        """The request's body as it comes: a response that runs for as long as its client likes."""
        await send({"type": "http.response.start", "status": 200})
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            await send({"type": "http.response.body", "body": message.get("body", b""), "more_body": more})

    routes = [Route("/ready", ready), Mount("/echo", app=echo), *FakeBatches(step=1).routes()]
    app = Starlette(routes=routes)
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        timeout_graceful_shutdown=int(settings.drain_timeout),
    )
