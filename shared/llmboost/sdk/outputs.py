"""Answers on their way from the SDK's event loop to the caller, who may be a thread or a coroutine."""

import asyncio
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TypedDict

from llmboost.entries import StreamError
from llmboost.sdk.inputs import Id


class LLMBoostError(Exception):
    """The SDK can't do what it was asked for; `str()` says why, and what to do."""


class ErrorDict(TypedDict):
    """Why an input was not answered, in the terms of OpenAI's error object."""

    message: str
    type: str
    code: str | None
    param: str | None


class Output(TypedDict):
    """Something that was generated for one input."""

    id: Id
    """The input that it belongs to."""
    val: str
    """New text; without streaming, all of it."""
    finished: bool
    """Nothing more comes for this input. True exactly once for each."""
    index: int
    """Which of the `n` answers it belongs to."""
    finish_reason: str | None
    """`stop` or `length`, once this answer is complete."""
    error: ErrorDict | None
    """Set in the last output of an input that failed."""


def error_dict(error: StreamError) -> ErrorDict:
    """A stream's error for the caller."""
    return {"message": error.message, "type": error.type, "code": error.code, "param": error.param}


class Outputs:
    """What waits for the caller; new text joins what is already waiting of the same answer.

    Filled on one thread, emptied on any. So memory holds at most the text that was generated.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[tuple[Id, int], Output] = {}
        self._open: set[Id] = set()
        """Inputs of which the caller has not got the last output."""
        self._closed: LLMBoostError | None = None
        self._number = 0
        self._coroutines: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    # The SDK

    def expect(self, ids: Iterable[Id | None]) -> list[Id]:
        """Takes note of inputs, and names those without an id by their number.

        Raises:
            ValueError: an id is in use; nothing was noted.
            LLMBoostError: nothing can come any more.
        """
        with self._changed:
            self.check_closed()
            taken, named, number = set(self._open), [], self._number
            for each in ids:
                if each is None:
                    while number in taken:
                        number += 1
                    each, number = number, number + 1
                elif each in taken:
                    raise ValueError(f"the id {each!r} belongs to an input that is not finished")
                taken.add(each)
                named.append(each)
            self._open, self._number = taken, number
            return named

    def put(self, output: Output) -> None:
        """Hands an output over, or adds it to one of the same answer that waits."""
        key = output["id"], output["index"]
        with self._changed:
            before = self._waiting.get(key)
            if before is not None:
                output = {**output, "val": before["val"] + output["val"]}
                output["finish_reason"] = output["finish_reason"] or before["finish_reason"]
                if output["finished"]:
                    del self._waiting[key]  # to come back behind the other answers to the same input
            self._waiting[key] = output
            self._notify()

    def close(self, reason: LLMBoostError) -> None:
        """Nothing more will come: whoever waits for more gets this error. The first one counts."""
        with self._changed:
            self._closed = self._closed or reason
            self._notify()

    def _notify(self) -> None:
        self._changed.notify_all()
        for loop, event in self._coroutines:
            with suppress(RuntimeError):  # that loop was closed
                loop.call_soon_threadsafe(event.set)

    # The caller

    def get(self, timeout: float | None) -> list[Output]:
        """All that waits; waits itself until there is something.

        Raises:
            TimeoutError: there was nothing in time.
            LLMBoostError: nothing can come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._waiting:
                self._check()
                remaining = None if deadline is None else deadline - time.monotonic()
                if remaining is not None and remaining <= 0:
                    raise TimeoutError(f"no output within {timeout:g} s")
                self._changed.wait(remaining)
            return [self._take(key) for key in list(self._waiting)]

    async def aget(self) -> Output:
        """The output that has waited longest. Cancelled while it waits, it takes nothing.

        Raises:
            LLMBoostError: nothing can come.
        """
        waiter = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._coroutines.append(waiter)
        try:
            while True:
                with self._changed:
                    if self._waiting:
                        return self._take(next(iter(self._waiting)))
                    self._check()
                    waiter[1].clear()
                await waiter[1].wait()
        finally:
            with self._changed:
                self._coroutines.remove(waiter)

    def _take(self, key: tuple[Id, int]) -> Output:
        output = self._waiting.pop(key)
        if output["finished"]:
            self._open.discard(output["id"])
            if not self._open:
                self._notify()  # somebody else may wait for what will not come
        return output

    def check_closed(self) -> None:
        """Raises the error that `close` was called with."""
        if self._closed is not None:
            raise self._closed

    def _check(self) -> None:
        self.check_closed()
        if not self._open:
            raise LLMBoostError("no input is being answered: issue one with issues_inputs")
