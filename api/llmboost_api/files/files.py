"""The files of a pod: storage and catalogue together. What routes and batches use."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import suppress
from functools import partial
from types import TracebackType

from redis.asyncio import Redis
from redis.exceptions import RedisError

from llmboost.jobs import is_id, new_id, now
from llmboost_api.files.catalogue import RESERVED_S, Catalogue
from llmboost_api.files.record import ID_PREFIX, FileRecord
from llmboost_api.files.storage import FileStorage, StorageError
from llmboost_api.patience import answered
from llmboost_api.tasks import discard

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0
PARTS_KEPT_S = 24 * 3600.0
"""How long after its last byte a partial object may still be somebody's."""


class Files:
    """Files of all owners; an async context manager that sweeps while it is entered.

    Methods raise `StorageError` if the storage fails, and `ApiError` (503) if Redis does.
    """

    def __init__(self, redis: Redis, storage: FileStorage) -> None:
        self.storage = storage
        self.catalogue = Catalogue(redis)
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Files":
        self._sweeper = asyncio.create_task(self._sweep_forever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await discard(self._sweeper)
        await asyncio.to_thread(self.storage.close)

    # Making

    def draft(self, owner: str) -> "Draft":
        """A new file, to be written and then published."""
        return Draft(self, owner)

    async def create(
        self,
        owner: str,
        filename: str,
        purpose: str,
        chunks: AsyncIterable[bytes],
        life_s: int | None = None,
    ) -> FileRecord:
        """A new file with these bytes, which expires after `life_s` seconds, if at all."""
        async with self.draft(owner) as draft:
            async for chunk in chunks:
                await draft.write(chunk)
            return await draft.publish(filename, purpose, life_s)

    async def reserve(self, owner: str, file_id: str) -> None:
        """To be called before an object is written under a file's id, and every hour until it is published:
        else it is removed after a while (`catalogue.RESERVED_S`)."""
        await answered(partial(self.catalogue.reserve, owner, file_id))

    async def publish(self, record: FileRecord) -> None:
        """Makes a file of an object that lies in the storage under its id. May be called again."""
        await answered(partial(self.catalogue.publish, record))

    # Reading

    async def get(self, owner: str, file_id: str) -> FileRecord | None:
        """The record of one of the owner's files; None if there is no such file."""
        if not is_file_id(file_id):
            return None
        return await answered(partial(self.catalogue.get, owner, file_id))

    def read(self, record: FileRecord) -> AsyncGenerator[bytes, None]:
        """The file's bytes."""
        return self.storage.read(record.id)

    async def page(
        self, owner: str, *, after: str | None, limit: int, newest_first: bool, purpose: str | None
    ) -> tuple[list[FileRecord], bool]:
        """Up to `limit` of the owner's files, and whether there are more.

        Raises:
            ValueError: `after` is no id of a file.
        """

        async def collect() -> tuple[list[FileRecord], bool]:
            found: list[FileRecord] = []
            async for record in self.catalogue.walk(owner, after=after, newest_first=newest_first):
                if purpose is not None and record.purpose != purpose:
                    continue
                if len(found) == limit:
                    return found, True
                found.append(record)
            return found, False

        if after is not None and not is_file_id(after):
            raise ValueError(f"{after!r} is no id of a file")
        return await answered(collect)

    # Removing

    async def delete(self, owner: str, file_id: str) -> bool:
        """Removes one of the owner's files; false if there is no such file."""
        record = await self.get(owner, file_id)
        if record is None:
            return False
        await answered(partial(self.catalogue.remove, record))
        try:
            await self.storage.delete(record.id)
        except StorageError as error:  # a sweep will do it
            logger.warning("not removed yet: file=%s %s", record.id, error)
        return True

    async def sweep(self) -> int:
        """Removes what has expired, and what killed uploads have left; returns how many files went.

        Several pods may sweep at once.
        """
        count = 0
        while removed := await self.catalogue.remove_due():
            for owner, file_id in removed:
                await self.storage.discard(file_id)
                await self.catalogue.forget(owner, file_id)
                count += 1
        return count

    async def _sweep_forever(self) -> None:
        parts_swept = -PARTS_KEPT_S
        while True:
            try:
                if count := await self.sweep():
                    logger.info("removed %d expired or abandoned files", count)
                if time.monotonic() - parts_swept > 3600:
                    await self.storage.sweep(PARTS_KEPT_S)
                    parts_swept = time.monotonic()
            except (StorageError, RedisError, OSError) as error:
                logger.warning("can't sweep files: %s", error)
            except Exception:  # a defect here must not keep expired files for ever
                logger.exception("can't sweep files")
            await asyncio.sleep(SWEEP_EVERY_S * random.uniform(0.5, 1.5))


class Draft:
    """A file in the making. Of one that was not published by the end of the block, nothing is left."""

    def __init__(self, files: Files, owner: str) -> None:
        self.id = new_id(ID_PREFIX)
        self.owner = owner
        self._files = files
        self._writer = files.storage.write(self.id)
        self._publishing = False
        self._reserve_at = 0.0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._writer.size

    async def __aenter__(self) -> "Draft":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Once it was to be published, Redis may know it, whatever was heard of that. If it does not, a sweep
        # removes the bytes.
        if self._publishing:
            return
        if await self._writer.abort() and self._reserve_at:
            with suppress(RedisError, OSError):
                await self._files.catalogue.forget(self.owner, self.id)

    async def write(self, data: bytes) -> None:
        """Adds to the file; waits for the storage."""
        if time.monotonic() >= self._reserve_at:
            await self._files.reserve(self.owner, self.id)
            self._reserve_at = time.monotonic() + RESERVED_S / 4
        await self._writer.write(data)

    async def publish(self, filename: str, purpose: str, life_s: int | None = None) -> FileRecord:
        """Makes it a file that its owner sees, for `life_s` seconds or until it is deleted."""
        await self.write(b"")
        await self._writer.commit()
        created = int(now())
        record = FileRecord(
            id=self.id,
            bytes=self.size,
            created_at=created,
            filename=filename,
            purpose=purpose,
            owner=self.owner,
            expires_at=None if life_s is None else created + life_s,
        )
        self._publishing = True
        await self._files.publish(record)
        return record


def is_file_id(text: str) -> bool:
    """Whether it was made here as the id of a file."""
    return is_id(text, ID_PREFIX)
