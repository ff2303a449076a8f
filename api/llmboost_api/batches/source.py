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


async def stored(call: Callable[[], Awaitable[T]]) -> T:
    """Awaits `call()` until the storage does not fail.

    Raises:
        NoSuchObject: there is nothing of that name.
    """
    delay = FIRST_S
    while True:
        try:
            return await call()
        except NoSuchObject:
            raise
        except StorageError as error:
            logger.warning("the storage of files failed, which is tried again: %s", error)
        await asyncio.sleep(delay)
        delay = min(2 * delay, MOST_S)


async def lines_of(storage: FileStorage, name: str, max_bytes: int) -> AsyncIterator[Line]:
    """All lines of an object, whatever the storage does meanwhile.

    Raises:
        NoSuchObject: it is gone.
    """
    offset, number = 0, 1
    delay = FIRST_S
    while True:
        try:
            async for line in storage.lines(name, offset=offset, number=number, max_bytes=max_bytes):
                yield line
                offset, number, delay = line.end, line.number + 1, FIRST_S
            return
        except NoSuchObject:
            raise
        except StorageError as error:
            logger.warning("the storage of files failed, which is tried again: %s", error)
        await asyncio.sleep(delay)
        delay = min(2 * delay, MOST_S)


async def line_at(storage: FileStorage, name: str, line: tuple[int, int], max_bytes: int) -> Line:
    """One line again: (number, offset)."""
    number, offset = line
    async for found in storage.lines(name, offset=offset, number=number, max_bytes=max_bytes):
        return found
    raise NoSuchObject(f"{name} has no line {number}")


def folder(batch_id: str) -> str:
    """What the names of a batch's parts begin with."""
    return f"batches/{batch_id}"
