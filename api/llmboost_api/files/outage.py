"""A storage of files that is away, as a client sees it."""

import logging

from fastapi import FastAPI, Request, Response

from llmboost_api.errors import unavailable
from llmboost_api.files.storage import StorageError

logger = logging.getLogger(__name__)


def install(app: FastAPI) -> None:
    """Any request that needs the storage then gets a 503 while it is away."""
    app.add_exception_handler(StorageError, _on_storage_error)


async def _on_storage_error(request: Request, error: Exception) -> Response:
    logger.warning("the storage of files failed: request_id=%s %s", request.state.request_id, error)
    message = "The storage of files can't be used at the moment. Try again in a few seconds."
    return unavailable(message).response()
