"""Whether names repeat, for any number of names in constant memory."""

import asyncio
import hashlib
import sqlite3
from types import TracebackType

CHUNK = 1000


class Uniqueness:
    """Names seen so far, in a temporary table on the disk; a context manager. Its work is done in threads."""

    def __init__(self) -> None:
        # A nameless database is private, and removed when it is closed. It is used by one thread at a time.
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode=OFF")
        self._database.execute("PRAGMA synchronous=OFF")
        self._database.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, number INT) WITHOUT ROWID")
        self._chunk: list[tuple[bytes, int]] = []

    def __enter__(self) -> "Uniqueness":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    async def add(self, name: str, number: int) -> list[tuple[int, int]]:
        """Notes the name of a numbered thing. Returns repetitions found by now among the names so far:
        (number, number of the first of that name)."""
        self._chunk.append((hashlib.blake2b(name.encode(), digest_size=16).digest(), number))
        return await self.flush() if len(self._chunk) >= CHUNK else []

    async def flush(self) -> list[tuple[int, int]]:
        """All repetitions that have not been returned yet."""
        chunk, self._chunk = self._chunk, []
        # Waited for even if the caller is cancelled: nobody may close the database under the thread.
        work = asyncio.ensure_future(asyncio.to_thread(self._insert, chunk))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait([work])
            raise

    def _insert(self, chunk: list[tuple[bytes, int]]) -> list[tuple[int, int]]:
        repeated = []
        self._database.execute("BEGIN")
        for digest, number in chunk:
            added = self._database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (digest, number))
            if added.rowcount == 0:
                (first,) = self._database.execute(
                    "SELECT number FROM seen WHERE digest = ?", (digest,)
                ).fetchone()
                repeated.append((number, first))
        self._database.execute("COMMIT")
        return repeated
