"""Where the bytes of files are: named objects in one folder, by fsspec URL. Local, or S3 for several hosts.

An object is there whole or not at all, whoever is killed while it is written. Names are the caller's ids,
never a client's. Everything blocking runs in a few threads of its own.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar, TypeVarTuple

from llmboost_api.files.folder import Folder, PartialObject, open_folder
from llmboost_api.files.lines import MAX_LINE_BYTES, Line, Splitter

logger = logging.getLogger(__name__)

THREADS = 8
"""As many operations at once; more wait for their turn."""
READ_BYTES = 1 << 20
"""What one read brings; one request to S3."""
WRITE_BYTES = 1 << 20
"""What is gathered before a write goes to a thread."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")

T = TypeVar("T")
A = TypeVarTuple("A")


class StorageError(Exception):
    """The storage can't be used at the moment; `str()` says why. What was asked may or may not be done."""


class NoSuchObject(StorageError):
    """There is nothing under that name."""


class FileStorage:
    """Named objects in the folder that a URL names.

    Every method raises `StorageError` if the storage fails, and `ValueError` for a name that is none: one or
    several parts of letters, digits, `_`, `-` and dots (not at the front), with `/` between.

    Raises:
        ValueError: nothing can be kept at that URL; says why.
    """

    def __init__(self, url: str) -> None:
        self._folder: Folder = open_folder(url)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="files")

    @property
    def url(self) -> str:
        """Where it is, without a password."""
        return self._folder.url

    def check(self) -> None:
        """Writes and removes an object. Blocks: for use before anything is served.

        Raises:
            ValueError: it refuses (no such bucket, no permission); trying again later is of no use.
            StorageError: it can't be reached now.
        """
        try:
            self._folder.check()
        except Exception as error:
            if self._folder.is_away(error):
                raise StorageError(_reason(error)) from error
            raise ValueError(
                f"files can't be kept in {self.url}: {_reason(error)}. Give another place with --files-url."
            ) from error

    def close(self) -> None:
        """Ends the threads, once what they do is done."""
        self._threads.shutdown()

    # Writing

    def write(self, name: str) -> "Writer":
        """A writer of an object, which replaces an older one: `async with storage.write(name) as writer`."""
        return Writer(self, checked(name))

    async def put(self, name: str, data: bytes) -> None:
        """A small object, at once."""
        async with self.write(name) as writer:
            await writer.write(data)

    async def concat(self, names: Iterable[str], target: str) -> int:
        """Makes one object of several, in constant memory; returns its size.

        Raises:
            NoSuchObject: one of them is missing.
        """
        async with self.write(target) as writer:
            for name in names:
                async for chunk in self.read(name):
                    await writer.write(chunk)
        return writer.size

    async def delete(self, name: str) -> None:
        """Removes an object; there may be none."""
        await self.run(self._folder.delete, checked(name))

    async def discard(self, name: str) -> None:
        """Removes an object, and what killed writers of it have left."""
        await self.run(self._folder.discard, checked(name))

    async def delete_all(self, prefix: str) -> None:
        """Removes all objects under a name, such as `batch-1` for `batch-1/…`."""
        await self.run(self._folder.delete_all, checked(prefix))

    # Reading

    async def read(self, name: str, offset: int = 0) -> AsyncGenerator[bytes, None]:
        """The object's bytes from `offset` on, in pieces of `READ_BYTES` at most.

        Raises:
            NoSuchObject: there is none.
        """
        size = await self.size(name)
        while offset < size:
            piece = await self.run(self._folder.read, name, offset, min(offset + READ_BYTES, size))
            if not piece:
                raise StorageError(f"{name} ends at {offset} of {size} bytes")
            offset += len(piece)
            yield piece

    async def lines(
        self, name: str, *, offset: int = 0, number: int = 1, max_bytes: int = MAX_LINE_BYTES
    ) -> AsyncGenerator[Line, None]:
        """The object's lines from `offset` on, in constant memory; the first has `number`.

        `line.end` of one is the `offset` at which the next begins. A line longer than `max_bytes` comes
        without its data.

        Raises:
            NoSuchObject: there is none.
        """
        splitter = Splitter(offset=offset, number=number, max_bytes=max_bytes)
        async for piece in self.read(name, offset):
            for line in splitter.feed(piece):
                yield line
        for line in splitter.finish():
            yield line

    async def size(self, name: str) -> int:
        """Bytes of an object.

        Raises:
            NoSuchObject: there is none.
        """
        return await self.run(self._folder.size, checked(name))

    async def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        try:
            await self.size(name)
        except NoSuchObject:
            return False
        return True

    async def list(self, prefix: str) -> list[str]:
        """Names of all objects under a name, in order; none if there is no such name."""
        return await self.run(self._folder.list, checked(prefix))

    async def sweep(self, older_than: float) -> None:
        """Removes what killed writers left behind, if nothing was added to it for so many seconds."""
        await self.run(self._folder.sweep, older_than)

    async def run(self, function: Callable[[*A], T], *args: *A) -> T:
        """Calls it in a thread. A cancelled caller does not wait for it, and it goes on to its end."""
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.shield(loop.run_in_executor(self._threads, function, *args))
        except FileNotFoundError as error:
            raise NoSuchObject(_reason(error)) from error
        except Exception as error:  # whatever a filesystem raises; S3's have no common base
            raise StorageError(_reason(error)) from error


class Writer:
    """An object in the making: it is there, whole, when the block ends without an exception; not before."""

    def __init__(self, storage: FileStorage, name: str) -> None:
        self.size = 0
        """Bytes so far."""
        self._storage = storage
        self._partial: PartialObject = storage._folder.begin(name)
        self._gathered = bytearray()

    async def write(self, data: bytes) -> None:
        """Adds to the object; waits for the storage now and then."""
        self.size += len(data)
        self._gathered += data
        if len(self._gathered) >= WRITE_BYTES:
            await self._flush()

    async def commit(self) -> None:
        """Makes it visible, whole."""
        await self._flush()
        await self._storage.run(self._partial.commit)

    async def abort(self) -> bool:
        """Leaves nothing of it, committed or not; false if the storage failed at that."""
        try:
            await self._storage.run(self._partial.abort)
        except StorageError as failure:
            logger.warning("a partial file is left behind: %s", failure)
            return False
        return True

    async def _flush(self) -> None:
        data, self._gathered = self._gathered, bytearray()
        await self._storage.run(self._partial.write, data)

    async def __aenter__(self) -> "Writer":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            await self.abort()
            return
        try:
            await self.commit()
        except BaseException:
            await self.abort()
            raise


def checked(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is not.
    """
    if _NAME.fullmatch(name) is None or name.endswith(".part"):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f" ({error.filename})" if error.filename else "")
    return f"{error}" or type(error).__name__
