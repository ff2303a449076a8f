"""The API process: the FastAPI app, and the server that runs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from llmboost import logs
from llmboost.settings import ApiSettings
from llmboost_api import errors, openapi
from llmboost_api.middleware import RequestContext, allow_origins
from llmboost_api.pod import Pod
from llmboost_api.routes import chat, completions, health, models, responses, stored
from llmboost_api.server import PodServer


def create_app(settings: ApiSettings) -> FastAPI:
    """The app of one API pod, to be run once. Starts, and stays, whether or not Redis can be reached.

    Raises:
        ValueError: no Redis URL was given, or it is none.
    """
    pod = Pod(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pod:
            yield

    app = FastAPI(
        title="llmboost",
        description="Language models behind a message queue, in OpenAI's protocol.",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.pod = pod
    errors.install(app)
    app.add_middleware(RequestContext)
    allow_origins(app, settings.allowed_origins)  # The last is the outermost: it sees all answers.
    for routes in (chat, stored, completions, responses, models, health):
        app.include_router(routes.router)
    openapi.install(app)
    return app


def run(settings: ApiSettings) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns. Logs one line when it is ready.

    Raises:
        ValueError: no Redis URL was given, or it is none.
        SystemExit: it could not start; the log says why.
    """
    logs.configure(settings.log_level)
    PodServer(create_app(settings), settings).run()
