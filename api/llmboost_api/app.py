"""The API process: the FastAPI app, and the server that runs it."""

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from llmboost import logs
from llmboost.settings import ApiSettings
from llmboost_api import errors, openapi
from llmboost_api.batches.runner import BatchRunner
from llmboost_api.files import outage
from llmboost_api.files.storage import StorageError
from llmboost_api.middleware import RequestContext, allow_origins
from llmboost_api.pod import Pod
from llmboost_api.routes import batches, chat, completions, files, health, models, responses, stored
from llmboost_api.server import PodServer

logger = logging.getLogger(__name__)


def create_app(settings: ApiSettings) -> FastAPI:
    """The app of one API pod, to be run once. Starts, and stays, whether or not Redis can be reached.

    Raises:
        ValueError: no Redis URL was given, or it is none, or files can't be kept where they should be.
    """
    pod = Pod(settings)
    runner = BatchRunner(pod)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with pod, runner:
            yield

    app = FastAPI(
        title="llmboost",
        description="Language models behind a message queue, in OpenAI's protocol.",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.pod = pod
    app.state.batch_runner = runner
    errors.install(app)
    outage.install(app)
    app.add_middleware(RequestContext)
    allow_origins(app, settings.allowed_origins)  # The last is the outermost: it sees all answers.
    for routes in (chat, stored, completions, responses, files, batches, models, health):
        app.include_router(routes.router)
    openapi.install(app)
    return app


def run(settings: ApiSettings) -> int:
    """Serves until SIGTERM or SIGINT, then drains and returns the exit code. Logs one line when it is ready.

    Raises:
        SystemExit: it could not start; the log says why.
    """
    logs.configure(settings.log_level)
    try:
        app = create_app(settings)
        pod: Pod = app.state.pod
        pod.files.storage.check()
    except StorageError as error:  # as with Redis: it may come later
        logger.warning("the storage of files can't be reached yet: %s", error)
    except ValueError as error:
        print(f"llmboost api: error: {error}", file=sys.stderr)
        return 2
    PodServer(app, settings).run()
    return 0
