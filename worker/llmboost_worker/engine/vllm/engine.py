"""The vLLM engine: a thread with an event loop around vLLM's asynchronous engine."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Grammars
from llmboost_worker.engine.interface import (
    Engine,
    EngineError,
    EngineInfo,
    EngineStats,
    SequenceOutput,
    SequenceRequest,
    StepOutput,
)
from llmboost_worker.engine.transformers.sequence import Sequence as DrawnSequence
from llmboost_worker.engine.vllm import vocabulary
from llmboost_worker.engine.vllm.config import VllmConfig
from llmboost_worker.engine.vllm.core import VllmCore, failure

logger = logging.getLogger(__name__)

HEALTH_S = 0.5
"""How often vLLM is asked whether its processes live."""


class VllmEngine(Engine):
    """Continuous batching by vLLM.

    Callers touch the set of live sequences, under its lock, and leave everything else to the thread's loop,
    where a task for each sequence takes what vLLM gives it. What the tasks take in one turn of the loop
    goes out as one step.
    """

    def __init__(self, config: VllmConfig, tokens: Callable[[], Sequence[bytes]] | None = None) -> None:
        """`tokens`: the bytes of each token, as `Grammars` takes them; without, no output can be held to a
        grammar."""
        self._config = config
        self._tokens = tokens
        self._grammars: Grammars | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        """While it takes on requests."""
        self._lock = threading.Lock()
        self._live: set[str] = set()
        """Ids of sequences whose last output isn't out."""
        self._ended: BaseException | None = None
        """Why it takes on nothing any more."""
        self._num_running = 0
        self._steps = self._prompt_tokens = self._cached_tokens = self._output_tokens = 0

        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By sequence id."""
        self._step: StepOutput = []
        """What is handed over next."""

    def start(
        self, on_step: Callable[[StepOutput], None], on_failure: Callable[[BaseException], None]
    ) -> EngineInfo:
        if self._thread is not None:
            raise EngineError("the engine was started before: make a new one")
        self._on_step = on_step
        self._on_failure = on_failure
        started: Future[EngineInfo] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._work(started)), name="llmboost-engine", daemon=True
        )
        self._thread.start()
        info = started.result()
        if (tokens := self._tokens) is not None:
            # Compiled here to be refused here; then each process of vLLM's compiles it for itself.
            self._grammars = Grammars(
                lambda: vocabulary.publish(tokens()), info.vocab_size, info.eos_token_ids
            )
        return info

    def compile(self, grammar: Grammar) -> "Future[Any]":
        return super().compile(grammar) if self._grammars is None else self._grammars.compile(grammar)

    def add(self, requests: list[SequenceRequest]) -> None:
        """Raises:
        EngineError: the engine isn't running.
        ValueError: an id is in use.
        """
        with self._lock:
            if self._loop is None:
                raise EngineError(f"the engine isn't running: {self._ended or 'not started'}")
            for request in requests:
                if request.id in self._live:
                    raise ValueError(f"a sequence with id {request.id!r} is still running")
                self._live.add(request.id)
            self._loop.call_soon_threadsafe(self._accept, requests)

    def cancel(self, ids: list[str]) -> None:
        with self._lock:
            self._live.difference_update(ids)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._drop, ids)

    def stats(self) -> EngineStats:
        """A sequence counts as waiting until its first token: vLLM doesn't say when it begins."""
        running = self._num_running
        return EngineStats(
            running=running,
            waiting=max(0, len(self._live) - running),
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            output_tokens=self._output_tokens,
            cached_tokens=self._cached_tokens,
        )

    def close(self) -> None:
        self._end(EngineError("closed"))
        if self._grammars is not None:
            self._grammars.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _end(self, reason: BaseException) -> None:
        """Takes on nothing any more; wakes the thread."""
        with self._lock:
            self._ended = self._ended or reason
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._leave.set)
            self._loop = None
            self._live.clear()

    # From here on, the thread.

    async def _work(self, started: "Future[EngineInfo]") -> None:
        self._leave = asyncio.Event()
        try:
            core = await VllmCore.start(self._config)
        except BaseException as error:
            self._end(error)
            started.set_exception(error)
            return
        self._core = core
        with self._lock:
            if self._ended is None:
                self._loop = asyncio.get_running_loop()
            else:
                self._leave.set()
        started.set_result(core.info)
        try:
            while not self._leave.is_set():
                await core.check_health()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEALTH_S):
                        await self._leave.wait()
        except EngineError as error:
            self._fail(error)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        core.close()

    def _accept(self, requests: list[SequenceRequest]) -> None:
        for request in requests:
            try:
                sequence = DrawnSequence(request, self._core.info, arrival=0)
                if sequence.sampling.grammar is not None and sequence.matcher is None:
                    raise ValueError("its grammar has not been compiled")
            except Exception as error:  # whatever is wrong with a request is its own affair
                self._give(failure(request.id, str(error), is_refused=True))
                continue
            if reason := sequence.finish_reason():
                self._give(SequenceOutput(request.id, [], None, reason))
            else:
                self._tasks[request.id] = asyncio.create_task(self._run(request, sequence))

    def _drop(self, ids: list[str]) -> None:
        for id in ids:
            if task := self._tasks.pop(id, None):
                task.cancel()
        # Their ids may be in use again.
        self._step = [output for output in self._step if output.id not in ids]

    async def _run(self, request: SequenceRequest, sequence: DrawnSequence) -> None:
        has_begun = False
        try:
            async with contextlib.aclosing(self._core.generate(request, sequence)) as outputs:
                async for output in outputs:
                    if not has_begun:
                        has_begun = True
                        self._num_running += 1
                        self._prompt_tokens += sequence.num_prompt - output.cached_tokens
                        self._cached_tokens += output.cached_tokens
                    self._give(output)
        except EngineError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("sequence %s failed", request.id)
            self._give(failure(request.id, f"{type(error).__name__}: {error}"))
        finally:
            self._num_running -= has_begun
            if self._tasks.get(request.id) is asyncio.current_task():
                del self._tasks[request.id]

    def _give(self, output: SequenceOutput) -> None:
        """What comes in the same turn of the loop is one step."""
        if not self._step:
            asyncio.get_running_loop().call_soon(self._hand_over)
        self._step.append(output)

    def _hand_over(self) -> None:
        step, self._step = self._step, []
        with self._lock:
            step = [output for output in step if output.id in self._live]
            self._live.difference_update(output.id for output in step if output.finish_reason)
        if step:
            self._steps += 1
            self._output_tokens += sum(len(output.token_ids) for output in step)
            self._on_step(step)

    def _fail(self, error: EngineError) -> None:
        """vLLM has ended by itself."""
        if self._ended is None:
            logger.error("%s", error)
            # First: who hears of it ends the process. Otherwise a request that comes now would be refused
            # as if it were its own fault.
            self._on_failure(error)
            self._end(error)
