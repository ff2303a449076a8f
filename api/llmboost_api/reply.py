"""The response to a request for generation, streamed or whole: one path for every endpoint."""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmboost.settings import ApiSettings
from llmboost_api import errors
from llmboost_api.answer import Answer
from llmboost_api.errors import ApiError
from llmboost_api.generation import Generation
from llmboost_api.sse import RETRY, Frames, event_source
from llmboost_api.tasks import discard

logger = logging.getLogger(__name__)


class Reply(Response):
    """Follows the completion while it is called: leaving it, however that happens, leaves the streams."""

    def __init__(
        self,
        generation: Generation,
        settings: ApiSettings,
        framer: Frames | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`framer`: makes its stream; None: it is answered whole. `metadata`: of a stored completion."""
        super().__init__()
        self._generation = generation
        self._settings = settings
        self._framer = framer
        self._metadata = metadata

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises:
        ApiError: the answer is an error, and nothing has been sent yet.
        ClientDisconnect: the client left before anything was sent.
        """
        async with self._generation:
            if self._framer is not None:
                await self._stream(self._framer, scope, receive, send)
            else:
                whole = asyncio.create_task(self._whole())
                await _attended(whole, receive, seconds=None)
                response = Response(whole.result(), media_type="application/json")
                await response(scope, receive, send)

    # Whole

    async def _whole(self) -> bytes:
        answer = Answer(self._generation.form, self._generation.id)
        async for job, entries in self._generation:
            answer.take(job, entries)
        return answer.encode(self._metadata)

    # Streamed

    async def _stream(self, framer: Frames, scope: Scope, receive: Receive, send: Send) -> None:
        """No header goes out before there is something to send, so an early failure has its own status;
        but a request that waits long gets its headers and keep-alives."""
        async with aclosing(self._frames(framer)) as frames:
            first = asyncio.create_task(_next(frames))
            try:
                await _attended(first, receive, seconds=self._settings.headers_after)
                if first.done():
                    first.result()  # An error of its own, if it failed.
                    if framer.early_error is not None:
                        raise errors.from_stream(framer.early_error)
                shown = self._shown(framer, first, frames)
                await event_source(shown, self._settings)(scope, receive, send)
            finally:
                await discard(first)

    async def _frames(self, framer: Frames) -> AsyncGenerator[bytes]:
        async for step in self._generation:
            if frames := framer.frames(step):
                yield frames
            if framer.ended:
                return

    async def _shown(
        self, framer: Frames, first: "asyncio.Task[bytes]", rest: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        """The frames, the first of which are being waited for already; a failure becomes a frame."""
        opening = RETRY if self._generation.again else b""
        try:
            yield opening + await first
            opening = b""
            async for frames in rest:
                yield frames
        except ApiError as error:
            yield opening + framer.failure(error)
        except Exception:
            logger.exception("internal error: request_id=%s", self._generation.id)
            yield opening + framer.failure(errors.internal(self._generation.id))


async def _next(frames: AsyncIterator[bytes]) -> bytes:
    return await anext(frames)


async def _attended(task: "asyncio.Task[object]", receive: Receive, seconds: float | None) -> None:
    """Waits for the task for so long, while the client is there.

    Raises:
        ClientDisconnect: it left; the task is cancelled.
    """
    leaving = asyncio.create_task(_until_disconnect(receive))
    try:
        await asyncio.wait({task, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done() and not task.done():
            raise ClientDisconnect
    except BaseException:
        await discard(task)
        raise
    finally:
        await discard(leaving)


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
