"""The response to a request for generation, streamed or whole: one path for every endpoint."""

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmboost.entries import Delta, Terminal, Usage
from llmboost.settings import ApiSettings
from llmboost_api import errors
from llmboost_api.errors import ApiError
from llmboost_api.generation import Generation, Step, discard
from llmboost_api.protocol.sampling import GenerationRequest
from llmboost_api.protocol.shape import Choice, Shape
from llmboost_api.sse import Framer, add_usage, error_frame, event_source

logger = logging.getLogger(__name__)


class Reply(Response):
    """Submits the jobs when it is called, so that leaving it, however that happens, leaves the streams."""

    def __init__(
        self, generation: Generation, shape: Shape, request: GenerationRequest, settings: ApiSettings
    ) -> None:
        super().__init__()
        self._generation = generation
        self._shape = shape
        self._request = request
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises:
        ApiError: the answer is an error, and nothing has been sent yet.
        ClientDisconnect: the client left before anything was sent.
        """
        async with self._generation:
            if self._request.stream:
                await self._stream(scope, receive, send)
            else:
                whole = asyncio.create_task(self._whole())
                await _attended(whole, receive, seconds=None)
                response = Response(whole.result(), media_type="application/json")
                await response(scope, receive, send)

    # Whole

    async def _whole(self) -> bytes:
        n = self._request.n
        choices = [Choice() for _ in range(n * len(self._generation.jobs))]
        usage = Usage(0, 0)
        async for job, entries in self._generation:
            for _, entry in entries:
                if isinstance(entry, Delta):
                    for delta in entry.choices:
                        choice = choices[job * n + delta.index]
                        choice.texts.append(delta.text)
                        choice.logprobs += delta.logprobs or ()
                        choice.finish_reason = delta.finish_reason or choice.finish_reason
                elif isinstance(entry, Terminal):
                    if entry.error is not None:
                        raise errors.from_stream(entry.error)
                    usage = add_usage(usage, entry.usage)
        return self._shape.whole(choices, usage)

    # Streamed

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """No header goes out before there is something to send, so an early failure has its own status;
        but a request that waits long gets its headers and keep-alives."""
        first = self._generation.peek()
        await _attended(first, receive, seconds=self._settings.headers_after)
        if first.done():
            _raise_early_error(first.result())
        await event_source(self._frames(), self._settings)(scope, receive, send)

    async def _frames(self) -> AsyncIterator[bytes]:
        framer = Framer(
            self._shape,
            jobs=len(self._generation.jobs),
            n=self._request.n,
            event_ids=self._settings.event_ids,
            usage=self._request.include_usage or self._settings.always_include_usage,
        )
        job_id = self._generation.jobs[0].id
        try:
            async for step in self._generation:
                if frames := framer.frames(step):
                    yield frames
                if framer.ended:
                    return
        except ApiError as error:
            yield error_frame(error)
        except Exception:
            logger.exception("internal error: request_id=%s", job_id)
            yield error_frame(errors.internal(job_id))


def _raise_early_error(step: Step) -> None:
    for _, entry in step[1]:
        if isinstance(entry, Delta):
            return
        if isinstance(entry, Terminal) and entry.error is not None:
            raise errors.from_stream(entry.error)


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
