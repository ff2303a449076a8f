"""A pod, without a server, that stops at a chosen one of its dealings with the outside: for ever, as if it
had been killed; or until it is thawed. Or that one fails."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost.settings import ApiSettings
from llmboost_api.files.storage import StorageError
from llmboost_api.pod import Pod


class Killed(BaseException):
    """The process would be no more."""


class Fate:
    """Counts what a pod does: each command, pipeline, and operation on the storage."""

    def __init__(
        self, last: int | None = None, *, done: bool = False, frozen: bool = False, fails: bool = False
    ) -> None:
        """The pod stops with the operation of number `last`, which has its effect if it is `done`.

        `frozen`: until it is thawed. `fails`: it does not stop, but of this operation it hears an error.
        """
        self.count = 0
        self.reached = asyncio.Event()
        """It has stopped."""
        self.thawed = asyncio.Event()
        self._last = last
        self._done = done
        self._frozen = frozen
        self._fails = fails

    async def operation(self, call: Callable[[], Awaitable[Any]], failure: Exception) -> Any:
        self.count += 1
        number = self.count
        if self._last is None or number < self._last or (self._fails and number > self._last):
            return await call()
        chosen = number == self._last
        result = await call() if chosen and self._done else None
        self.reached.set()
        if self._fails:
            raise failure
        if not self._frozen:
            raise Killed
        await self.thawed.wait()
        return result if chosen and self._done else await call()


@asynccontextmanager
async def mortal_pod(settings: ApiSettings, fate: Fate) -> AsyncIterator[Pod]:
    """Only its parts: no task of its own runs beside what the test starts."""
    pod = Pod(settings)
    no_redis = RedisConnectionError("for a moment")
    execute, pipeline, run = pod.redis.execute_command, pod.redis.pipeline, pod.files.storage.run

    def mortal_pipeline(**options: Any) -> Any:
        pipe = pipeline(**options)
        send = pipe.execute
        pipe.execute = lambda *args: fate.operation(lambda: send(*args), no_redis)  # type: ignore[method-assign]
        return pipe

    pod.redis.execute_command = lambda *args, **options: fate.operation(  # type: ignore[method-assign]
        lambda: execute(*args, **options), no_redis
    )
    pod.redis.pipeline = mortal_pipeline  # type: ignore[method-assign, assignment]
    pod.files.storage.run = lambda *args: fate.operation(  # type: ignore[method-assign]
        lambda: run(*args), StorageError("for a moment")
    )
    try:
        yield pod
    finally:
        await pod.redis.aclose()
        await asyncio.to_thread(pod.files.storage.close)
