"""`LLMBoost`: the SDK's one class, blocking on the outside, an event loop in a thread of its own inside."""

import asyncio
import atexit
import concurrent.futures
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

from pydantic import ValidationError

from llmboost.processes import Processes, ProcessesError
from llmboost.sdk import inputs as checks
from llmboost.sdk.inputs import SAMPLING_NAMES, FormattedPrompt, Id
from llmboost.sdk.outputs import LLMBoostError, Output, Outputs
from llmboost.sdk.session import Session
from llmboost.settings import DEMO_MODEL, ServeSettings, WorkerSettings

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 3600.0
"""For workers of its own: a large model may have to be downloaded."""
FIND_TIMEOUT_S = 60.0
"""For the workers of a running system."""
REQUEST_TIMEOUT_S = 24 * 3600.0
"""Unlike an HTTP client's, an input may wait for thousands before it."""

_SETTINGS = {*WorkerSettings.model_fields, "data_dir", "request_timeout"} - {"model", "tp", "redis_url"}

T = TypeVar("T")


class LLMBoost:
    """Answers prompts with a language model.

        with LLMBoost("llmboost-demo", streaming=True, max_tokens=200) as llm:
            llm.issues_inputs(llm.apply_format([{"role": "user", "content": "Hello!"}]))
            finished = False
            while not finished:
                for output in llm.get_output():
                    print(output["val"], end="", flush=True)
                    finished = output["finished"]

    Many inputs may be in flight; `output["id"]` says which one an output belongs to. An input that fails
    raises nothing: its last output has `finished` and an `error`, so that the others go on.
    """

    def __init__(
        self,
        model_name: str = DEMO_MODEL,
        *,
        streaming: bool = False,
        enable_async_output: bool = False,
        tp: int = 1,
        dp: int = 1,
        max_tokens: int | None = None,
        redis_url: str | None = None,
        **options: Any,
    ) -> None:
        """Nothing starts before `start`.

        Args:
            model_name: Hub name or local folder; with `redis_url`, a name that is served there.
            streaming: Outputs are new text as it comes, instead of whole answers.
            enable_async_output: Outputs are awaited (`aget_output`) instead of waited for (`get_output`).
            tp: GPUs per worker.
            dp: Workers to start.
            max_tokens: Of each answer; None: all that the context has room for.
            redis_url: Of a running system to use (or LLMBOOST_REDIS_URL); it has workers of its own, so
                `tp`, `dp` and a worker's settings change nothing. None: Redis and workers are started.
            options: Sampling parameters for all inputs (`temperature`, `top_p`, `seed`, `stop`, …: see
                `SamplingOptions`), and settings by their names (`device`, `max_num_seqs`, `data_dir`, …).

        Raises:
            ValueError: a parameter is unknown or has a value that it can't have.
        """
        given = {name: value for name, value in options.items() if name in SAMPLING_NAMES}
        settings = {name: value for name, value in options.items() if name not in SAMPLING_NAMES}
        for name in settings.keys() - _SETTINGS:
            raise ValueError(f"LLMBoost: {checks.unknown(name, SAMPLING_NAMES | _SETTINGS)}")
        if max_tokens is not None:
            given["max_tokens"] = max_tokens
        checks.options(given, "LLMBoost")
        settings.setdefault("request_timeout", REQUEST_TIMEOUT_S)
        if redis_url is not None:
            settings["redis_url"] = redis_url
        try:
            self._settings = ServeSettings(model=model_name, tp=tp, dp=dp, **settings)
        except ValidationError as error:
            raise ValueError(f"LLMBoost: {checks.explain(error)}") from None
        self._sampling = given
        self._streaming = streaming
        self._async_output = enable_async_output
        self._running: _Running | None = None

    def start(self, timeout: float | None = None) -> None:
        """Starts what is needed and waits until the model answers, saying on stderr what it waits for.

        Calling it again does nothing.

        Args:
            timeout: Seconds; None: an hour to load a model, a minute to find a running system's.

        Raises:
            LLMBoostError: a worker can't start (says why), or none is there in time. Nothing is left running.
        """
        if self._running is None:
            running = _Running(self._settings)
            running.start(timeout)
            self._running = running
            self._finalizer = weakref.finalize(self, _drop, running)
            self._finalizer.atexit = False  # `_Running` sees to that itself, in the right order

    def stop(self) -> None:
        """Cancels what is in flight and frees everything. Calling it again does nothing."""
        running, self._running = self._running, None
        if running is not None:
            self._finalizer.detach()
            running.close()

    def __enter__(self) -> "LLMBoost":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def apply_format(self, messages: Sequence[dict[str, Any]]) -> FormattedPrompt:
        """A chat as the model's own template writes it, to be issued as a prompt. Waits for a worker.

        Raises:
            ValueError: these are no messages.
            LLMBoostError: the template refuses them.
        """
        running, chat = self._started, checks.chat(messages)
        running.outputs.check_closed()
        return FormattedPrompt(running.call(running.session.render(chat)))

    def issues_inputs(self, inputs: Any) -> list[Id]:
        """Begins to answer one input or a list of them; returns the ids that their outputs will have.

        An input is one of:
            a prompt: a string, to be continued as it is;
            a chat: a list of {"role": …, "content": …}, put into the model's template;
            a dict with `prompt` or `messages`, and perhaps an `id` (a string or an integer that no
                unfinished input has) and sampling parameters for this input alone.
        Without an `id` it is numbered 0, 1, 2, … in the order of issue.

        Raises:
            ValueError: one of them is none of these; none was issued.
        """
        running = self._started
        requests = checks.parse(inputs, self._sampling)
        ids = running.outputs.expect(request.id for request in requests)
        running.call_soon(
            lambda: running.session.ask(list(zip(ids, requests, strict=True)), streaming=self._streaming)
        )
        return ids

    issue_inputs = issues_inputs

    def get_output(self, timeout: float | None = None) -> list[Output]:
        """All outputs that wait to be taken, at least one; waits until there is one.

        Raises:
            TimeoutError: there was none within `timeout` seconds.
            LLMBoostError: no input is being answered, or nothing can be any more; says why.
        """
        if self._async_output:
            raise LLMBoostError("with enable_async_output=True, `await llm.aget_output()` instead")
        return self._started.outputs.get(timeout)

    async def aget_output(self) -> Output:
        """The next output; works in any event loop.

        Raises:
            LLMBoostError: no input is being answered, or nothing can be any more; says why.
        """
        if not self._async_output:
            raise LLMBoostError("aget_output needs LLMBoost(enable_async_output=True)")
        return await self._started.outputs.aget()

    @property
    def _started(self) -> "_Running":
        if self._running is None:
            raise LLMBoostError("it is not running: call start() first")
        return self._running


class _Running:
    """Everything between `start` and `stop`; knows nothing of the `LLMBoost`, which may be dropped."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.outputs = Outputs()
        self._process = os.getpid()
        self._processes: Processes | None = None
        self._session: Session | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="llmboost-sdk", daemon=True)
        self._closing = threading.Lock()
        self._reason = LLMBoostError("it was stopped")
        """Why nothing more comes, once nothing does."""

    @property
    def session(self) -> Session:
        assert self._session is not None
        return self._session

    def start(self, timeout: float | None) -> None:
        """Raises `LLMBoostError` if it can't, and leaves nothing running then."""
        try:
            self._thread.start()
            settings = self.settings
            if settings.redis_url is None:
                redis_url, model = self._start_processes(LOAD_TIMEOUT_S if timeout is None else timeout)
            else:
                redis_url, model = settings.redis_url, settings.model
            self._session = Session(
                redis_url,
                self.outputs,
                grace=settings.grace,
                retention=settings.retention,
                request_timeout=settings.request_timeout,
            )
            patience = FIND_TIMEOUT_S if timeout is None else timeout
            self.call(self._session.open(model, patience, say))
            atexit.register(self.close)  # after the processes' own, so that it comes before it
        except BaseException:
            self.close()
            raise

    def _start_processes(self, timeout: float) -> tuple[str, str]:
        settings = self.settings
        processes = Processes(settings, api=False, log=_log)
        say(f"starting {settings.model}")
        late = threading.Timer(timeout, processes.request_kill)
        late.daemon = True
        late.start()
        begun = time.monotonic()
        try:
            if not processes.start():
                raise LLMBoostError(f"{settings.model} was not ready within {timeout:g} s")
        except ProcessesError as error:
            raise LLMBoostError("\n".join(filter(None, (str(error), error.log)))) from None
        finally:
            late.cancel()
        self._processes = processes
        threading.Thread(target=self._watch, args=(processes,), name="llmboost-watch", daemon=True).start()
        say(f"ready after {time.monotonic() - begun:.1f} s")
        return processes.redis_url, processes.model

    def _watch(self, processes: Processes) -> None:
        """Nobody shall wait for processes that could not be kept running."""
        processes.wait()
        if processes.failure is not None:
            self._reason = LLMBoostError(str(processes.failure))
            self.outputs.close(self._reason)
            if self._session is not None:
                with suppress(RuntimeError):  # the loop was closed
                    self.call_soon(self._session.abort)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.locked()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the SDK's loop and waits for it; given up if the caller is interrupted."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise self._reason from None
        except BaseException:
            future.cancel()
            raise

    def call_soon(self, call: Callable[[], None]) -> None:
        """Has something done on the SDK's loop."""
        self._loop.call_soon_threadsafe(call)

    def close(self) -> None:
        """Ends everything; the second call, and one in a forked child, does nothing."""
        if os.getpid() != self._process or not self._closing.acquire(blocking=False):
            return
        atexit.unregister(self.close)
        self.outputs.close(self._reason)
        try:
            if self._session is not None:
                self.call(self._session.close())
        except Exception:
            logger.exception("the SDK did not close cleanly")
        finally:
            self._stop_loop()
            if self._processes is not None:
                try:
                    self._processes.stop()
                except BaseException:  # a second Ctrl-C
                    self._processes.request_kill()
                    raise

    def _run_loop(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def _stop_loop(self) -> None:
        if self._thread.ident is None:
            self._loop.close()
            return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)


def _drop(running: _Running) -> None:
    """For an `LLMBoost` that was dropped without `stop`, on whatever thread the collector runs."""
    if not running.closed:  # else, at the interpreter's end, there are no new threads to be had
        threading.Thread(target=running.close, name="llmboost-drop", daemon=True).start()


def say(line: str) -> None:
    """Progress, for whoever waits at the terminal."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"llmboost: {line}", file=sys.stderr, flush=True)


def _log(line: str) -> None:
    """A line of a child process: what the supervisor says is for the user, the rest for those who ask."""
    if line.startswith("[serve] "):
        say(line.removeprefix("[serve] "))
    else:
        logger.info("%s", line)
