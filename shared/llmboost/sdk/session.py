"""Requests to one model of a running system, on one event loop: a task for each, one tailer for all."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from redis.exceptions import AuthenticationError, RedisError

from llmboost.connection import connect
from llmboost.entries import CANCELLED_TYPE, GAP, Delta, ReadEntry, StreamError, Terminal
from llmboost.jobs import GenerationJob, Prompt, SamplingParams, new_id, now
from llmboost.queue import JobQueue
from llmboost.registry import ModelCard, Registry
from llmboost.sdk.inputs import Id, Request
from llmboost.sdk.outputs import LLMBoostError, Outputs, error_dict
from llmboost.streams import StreamGone, TokenStreams, is_passing, persist
from llmboost.tailer import Tailer, TailerClosed
from llmboost.transcript import StreamGap

logger = logging.getLogger(__name__)

MOST_IN_FLIGHT = 1024
"""Requests in the queue or running; more wait here. More than that keeps no worker busier, and each
costs every XREAD of the tailer something."""
RENDER_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 3.0
"""For sealing what is in flight: the end of the audience does the same, later."""
_FIRST_NOTE_S, _NOTES_S = 2.0, 20.0

STOPPED = StreamError(
    "The request was cancelled: its client was stopped.", CANCELLED_TYPE, "client_gone", status=499
)
GONE = StreamError("The answer expired or was lost with its server. Ask again.", code="stream_gone")
LOST = StreamError("The queue's server failed while the answer was being read.", code="stream_lost")


class Session:
    """Asks one model; `open` first, `close` at last, all on the same loop."""

    def __init__(
        self, redis_url: str, outputs: Outputs, *, grace: float, retention: float, request_timeout: float
    ) -> None:
        self.id = f"sdk-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._redis = connect(redis_url, client_name=self.id)
        self._streams = TokenStreams(self._redis, retention)
        self._queue = JobQueue(self._redis, self._streams)
        self._tailer = Tailer(self._streams, redis_url=redis_url, grace=grace)
        self._outputs = outputs
        self._grace = grace
        self._request_timeout = request_timeout
        self._slots = asyncio.Semaphore(MOST_IN_FLIGHT)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unsealed: set[str] = set()
        """Ids of jobs that were submitted, and whose end was not seen."""
        self._stack = AsyncExitStack()
        self.model = ""
        """The name of the model's queue, once open."""

    async def open(self, model: str, patience: float, say: Callable[[str], None]) -> None:
        """Waits until a worker serves the model.

        Raises:
            LLMBoostError: none does in time, or Redis can't be used.
        """
        self._stack.push_async_callback(self._redis.aclose)
        await self._stack.enter_async_context(self._tailer)
        self.model = (await _wait_for_model(Registry(self._redis), model, patience, say)).root

    async def close(self) -> None:
        """Ends what is in flight, and lets go of Redis."""
        self.abort()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        terminal = Terminal(self.id, error=STOPPED)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                for job_id in self._unsealed:
                    await self._queue.cancel(job_id, terminal)
        except (RedisError, OSError, TimeoutError) as error:
            logger.info("%d requests are left to end by themselves: %r", len(self._unsealed), error)
        await self._stack.aclose()

    def abort(self) -> None:
        """Stops waiting for anything."""
        for task in self._tasks:
            task.cancel()

    def ask(self, requests: Sequence[tuple[Id, Request]], *, streaming: bool) -> None:
        """Begins to answer; the outputs come to `Outputs`. Never waits."""
        for each_id, request in requests:
            self._spawn(self._answer(each_id, request, streaming))

    async def render(self, messages: list[dict[str, Any]]) -> str:
        """A chat as the model's own template writes it: by a worker, for only it has the template.

        Raises:
            LLMBoostError: it can't be rendered, or no worker answers in time.
        """
        job = self._job(Prompt(messages=messages), SamplingParams(max_tokens=0), echo=True)
        answer = _Answer(1)
        error: StreamError | None
        try:
            async with asyncio.timeout(RENDER_TIMEOUT_S):
                error = await self._spawn(self._run(job, answer.take))
        except TimeoutError:
            raise LLMBoostError(f"no worker rendered the chat within {RENDER_TIMEOUT_S:g} s") from None
        if error is not None:
            raise LLMBoostError(error.message)
        return answer.text(0)

    def _spawn(self, coroutine: Any) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _job(self, prompt: Prompt, sampling: SamplingParams, *, echo: bool = False) -> GenerationJob:
        created = now()
        return GenerationJob(
            id=new_id("sdk"),
            model=self.model,
            prompt=prompt,
            sampling=sampling,
            echo=echo,
            created=created,
            deadline=created + self._request_timeout,
        )

    async def _answer(self, each_id: Id, request: Request, streaming: bool) -> None:
        choices = request.sampling.n
        answer = _Answer(choices)

        def put(index: int, *, finished: bool = False, error: StreamError | None = None) -> None:
            self._outputs.put(
                {
                    "id": each_id,
                    "val": answer.take_text(index) if error is None or streaming else "",
                    "finished": finished,
                    "index": index,
                    "finish_reason": answer.finish_reasons[index],
                    "error": error_dict(error) if error is not None else None,
                }
            )

        def on_entries(entries: list[ReadEntry]) -> None:
            touched = answer.take(entries)
            if streaming:
                for index in touched:
                    put(index)

        error: StreamError | None
        try:
            async with self._slots:
                error = await self._run(self._job(request.prompt, request.sampling), on_entries)
        except Exception as failure:
            logger.exception("input %r failed", each_id)
            error = StreamError(f"The request failed: {type(failure).__name__}: {failure}")
        if error is not None:
            # Whoever only prints `val` sees it too.
            logger.warning("input %r was not answered: %s", each_id, error.message)
            put(0, finished=True, error=error)
            return
        for index in range(choices):
            if not streaming or index == choices - 1:
                put(index, finished=index == choices - 1)

    async def _run(
        self, job: GenerationJob, on_entries: Callable[[list[ReadEntry]], object]
    ) -> StreamError | None:
        """Submits a job and reads its stream to the end; returns the error in which it ended."""
        self._unsealed.add(job.id)
        await persist(partial(self._queue.submit, job, audience=self._grace))
        try:
            async with self._tailer.tail(job.id) as subscription:
                async for entries in subscription:
                    on_entries(entries)
                    last = entries[-1][1]
                    if isinstance(last, Terminal):
                        self._unsealed.discard(job.id)
                        return last.error
        except StreamGone:
            self._unsealed.discard(job.id)
            return GONE
        except StreamGap:
            return GAP
        except TailerClosed:
            return LOST
        return LOST


class _Answer:
    """What the choices of a request have so far."""

    def __init__(self, choices: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self.finish_reasons: list[str | None] = [None] * choices

    def take(self, entries: list[ReadEntry]) -> list[int]:
        """Adds entries; returns the choices that there is something new to say of."""
        touched: set[int] = set()
        for _, entry in entries:
            if isinstance(entry, Delta):
                for delta in entry.choices:
                    if delta.text:
                        self._texts[delta.index].append(delta.text)
                    if delta.finish_reason is not None:
                        self.finish_reasons[delta.index] = delta.finish_reason
                    if delta.text or delta.finish_reason is not None:
                        touched.add(delta.index)
        return sorted(touched)

    def text(self, index: int) -> str:
        return "".join(self._texts[index])

    def take_text(self, index: int) -> str:
        """The text that was not taken yet."""
        text = self.text(index)
        self._texts[index].clear()
        return text


async def _wait_for_model(
    registry: Registry, name: str, patience: float, say: Callable[[str], None]
) -> ModelCard:
    begun = now()
    next_note = begun + _FIRST_NOTE_S
    while True:
        missing = f"a worker that serves {name!r}"
        try:
            card = await registry.model(name)
            if card is not None and any(each.model == card.root for each in await registry.workers()):
                return card
            if others := [each.name for each in await registry.models() if each.name != name]:
                missing += f" (known there: {', '.join(others)})"
        except AuthenticationError as error:
            raise LLMBoostError(f"Redis refuses the password in redis_url: {error}") from None
        except (RedisError, OSError) as error:
            if not is_passing(error):
                raise LLMBoostError(f"Redis can't be used: {error}") from error
            missing = f"Redis ({error})"
        waited = now() - begun
        if waited > patience:
            raise LLMBoostError(f"waited {patience:g} s in vain for {missing}")
        if now() >= next_note:
            next_note += _NOTES_S
            say(f"waiting for {missing} ({waited:.0f} s)")
        await asyncio.sleep(0.1)
