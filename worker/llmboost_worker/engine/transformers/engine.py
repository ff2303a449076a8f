"""The transformers engine: a thread around `EngineCore`."""

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from llmboost.jobs import Grammar
from llmboost_worker.engine.grammar import Grammars
from llmboost_worker.engine.interface import (
    Engine,
    EngineError,
    EngineInfo,
    EngineStats,
    SequenceRequest,
    StepOutput,
)
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.core import EngineCore
from llmboost_worker.engine.transformers.followers import Followers
from llmboost_worker.engine.transformers.ranks import Place

logger = logging.getLogger(__name__)


class TransformersEngine(Engine):
    """Continuous batching around any causal model of transformers.

    Callers only touch the inbox, under its lock. The model and every tensor belong to the compute thread,
    which sleeps on the inbox when there is nothing to compute.
    """

    def __init__(self, config: EngineConfig, tokens: Callable[[], Sequence[bytes]] | None = None) -> None:
        """`tokens`: the bytes of each token, as `Grammars` takes them; without, no output can be held to a
        grammar."""
        self._config = config
        self._tokens = tokens
        self._grammars: Grammars | None = None
        self._thread: threading.Thread | None = None
        self._inbox = threading.Condition()
        self._added: list[SequenceRequest] = []
        self._cancelled: list[str] = []
        self._live: set[str] = set()
        """Ids of sequences whose last output isn't out."""
        self._closing = False
        self._ended: BaseException | None = None
        """Why it takes on nothing any more."""
        self._followers: Followers | None = None
        self._stats = EngineStats(running=0, waiting=0, steps=0, prompt_tokens=0, output_tokens=0)
        """As of the last step, except that `waiting` grows when requests are taken from the inbox."""

    def start(
        self, on_step: Callable[[StepOutput], None], on_failure: Callable[[BaseException], None]
    ) -> EngineInfo:
        if self._thread is not None:
            raise EngineError("the engine was started before: make a new one")
        started: Future[EngineInfo] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(started, on_step, on_failure), name="llmboost-engine", daemon=True
        )
        self._thread.start()
        info = started.result()
        if self._tokens is not None:
            self._grammars = Grammars(self._tokens, info.vocab_size, info.eos_token_ids)
        return info

    def compile(self, grammar: Grammar) -> "Future[Any]":
        return super().compile(grammar) if self._grammars is None else self._grammars.compile(grammar)

    def add(self, requests: list[SequenceRequest]) -> None:
        """Raises:
        EngineError: the engine isn't running.
        ValueError: an id is in use.
        """
        with self._inbox:
            if self._thread is None or self._closing or self._ended is not None:
                raise EngineError(f"the engine isn't running: {self._ended or 'not started, or closed'}")
            for request in requests:
                if request.id in self._live:
                    raise ValueError(f"a sequence with id {request.id!r} is still running")
                self._live.add(request.id)
                self._added.append(request)
            self._inbox.notify()

    def cancel(self, ids: list[str]) -> None:
        with self._inbox:
            self._live.difference_update(ids)
            self._added = [request for request in self._added if request.id not in ids]
            self._cancelled += ids
            # No wake-up: an idle engine has nothing to cancel.

    def stats(self) -> EngineStats:
        with self._inbox:
            return replace(self._stats, waiting=self._stats.waiting + len(self._added))

    def close(self) -> None:
        with self._inbox:
            self._closing = True
            self._inbox.notify()
        if self._grammars is not None:
            self._grammars.close()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # From here on, the compute thread.

    def _work(
        self,
        started: "Future[EngineInfo]",
        on_step: Callable[[StepOutput], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        fail = _once(on_failure)
        try:
            with torch.inference_mode():
                core = EngineCore(self._config, self._place(started, fail))
        except BaseException as error:
            self._end(error)
            self._dismiss()
            if not isinstance(error, EngineError):
                logger.exception("can't start the engine")
                error = EngineError(f"can't start the engine: {type(error).__name__}: {error}")
            with suppress(InvalidStateError):  # a rank that died has said why
                started.set_exception(error)
            return
        self._publish(core, [])
        started.set_result(core.info)
        try:
            with torch.inference_mode():
                while self._receive(core):
                    outputs = self._publish(core, core.step())
                    if outputs:
                        on_step(outputs)
        except BaseException as error:
            logger.exception("the engine ended by itself")
            # First: who hears of it ends the process. Otherwise a request that comes now would be refused
            # as if it were its own fault.
            try:
                fail(error)
            finally:
                self._end(error)
        else:
            self._end(EngineError("closed"))
        finally:
            core.close()
            self._dismiss()
            del core
            gc.collect()  # modules refer to themselves through hooks
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _place(self, started: "Future[EngineInfo]", fail: Callable[[BaseException], None]) -> Place | None:
        """Rank 0's, among others that are started here if torchrun hasn't.

        Raises:
            EngineError: torchrun has started more or fewer than the model is to be split over.
        """
        if self._config.tp == 1:
            return None
        place = Place.given()
        if place is not None:
            if place.size != self._config.tp:
                raise EngineError(
                    f"torchrun has started {place.size} processes, but --tp is {self._config.tp}: "
                    "make them the same, or leave torchrun out"
                )
            return place

        def ended(what: str) -> None:
            error = EngineError(what)
            try:
                started.set_exception(error)
            except InvalidStateError:
                fail(error)

        self._followers = Followers(self._config, ended)
        self._followers.start(self._config)
        return self._followers.place

    def _dismiss(self) -> None:
        if self._followers is not None:
            self._followers.close()

    def _receive(self, core: EngineCore) -> bool:
        """Takes what callers have left; waits for it when there is nothing to compute. False: time to end."""
        with self._inbox:
            if core.is_idle:
                self._inbox.wait_for(lambda: self._added or self._closing)
            if self._closing:
                return False
            cancelled, self._cancelled = self._cancelled, []
            added, self._added = self._added, []
            self._stats = replace(self._stats, waiting=self._stats.waiting + len(added))
        core.cancel(cancelled)
        core.add(added)
        return True

    def _publish(self, core: EngineCore, outputs: StepOutput) -> StepOutput:
        """Makes the step's figures visible; returns what is for sequences that weren't cancelled
        meanwhile."""
        with self._inbox:
            self._stats = core.stats
            outputs = [output for output in outputs if output.id not in self._cancelled]
            self._live.difference_update(output.id for output in outputs if output.finish_reason)
        return outputs

    def _end(self, reason: BaseException) -> None:
        with self._inbox:
            self._ended = reason
            self._stats = replace(self._stats, running=0, waiting=0)
            self._added, self._cancelled = [], []
            self._live.clear()


def _once(tell: Callable[[BaseException], None]) -> Callable[[BaseException], None]:
    """Tells of the first failure: when a rank dies, the step notices and so does who watches it."""
    told = threading.Lock()

    def first(error: BaseException) -> None:
        if told.acquire(blocking=False):
            tell(error)

    return first
