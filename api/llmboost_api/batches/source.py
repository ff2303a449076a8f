"""Objects of a batch in the storage, which may be away for a while."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from llmboost_api.files.lines import Line
from llmboost_api.files.storage import FileStorage, NoSuchObject, StorageError

logger = logging.getLogger(__name__)

FIRST_S, MOST_S = 0.2, 5.0
"""Between tries."""

T = TypeVar("T")


class _Pauses:
    """Those between tries in a row, each twice as long as the one before."""

    def __init__(self) -> None:
        self._next = FIRST_S

    async def after(self, error: StorageError) -> None:
        """Waits for the next try; there is none for what does not exist, and the error is raised."""
        if isinstance(error, NoSuchObject):
            raise error
        logger.warning("the storage of files failed, which is tried again: %s", error)
        await asyncio.sleep(self._next)
        self._next = min(2 * self._next, MOST_S)


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """Awaits `call()` until the storage does not fail: what `streams.persist` is for Redis.

    Raises:
        NoSuchObject: there is nothing of that name.
    """
    pauses = _Pauses()
    while True:
        try:
            return await call()
        except StorageError as error:
            await pauses.after(error)


async def lines_of(storage: FileStorage, name: str, max_bytes: int) -> AsyncIterator[Line]:
    """All lines of an object, whatever the storage does meanwhile.

    Raises:
        NoSuchObject: it is gone.
    """
    offset, number = 0, 1
    pauses = _Pauses()
    while True:
        try:
            async for line in storage.lines(name, offset=offset, number=number, max_bytes=max_bytes):
                yield line
                offset, number, pauses = line.end, line.number + 1, _Pauses()
            return
        except StorageError as error:
            await pauses.after(error)


async def line_at(storage: FileStorage, name: str, *, number: int, offset: int, max_bytes: int) -> Line:
    """One line again, which begins at `offset`.

    Raises:
        NoSuchObject: it is gone.
    """
    async for found in storage.lines(name, offset=offset, number=number, max_bytes=max_bytes):
        return found
    raise NoSuchObject(f"{name} has no line {number}")


def folder(batch_id: str) -> str:
    """What the names of a batch's parts begin with."""
    return f"batches/{batch_id}"
