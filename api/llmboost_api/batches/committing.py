"""Rows into parts: written, then committed, and only then are the streams that they came from forgotten."""

import asyncio
import logging
import secrets
import time
from contextlib import suppress
from functools import partial

from llmboost.streams import persist
from llmboost_api.batches.holding import BatchLost, Holding
from llmboost_api.batches.ledger import Ledger
from llmboost_api.batches.output import Written
from llmboost_api.batches.source import folder, stored
from llmboost_api.files.storage import StorageError
from llmboost_api.pod import Pod

logger = logging.getLogger(__name__)

OFTEN_S = 1.0
RARELY = 0.02
"""Rows wait for a second, or for this part of the time that the batch has taken, if that is longer: so there
are not too many parts, and never much to do again."""
DELETED_AT_ONCE = 500


class Committer:
    """Brings the rows of one batch, as one runner has them, where nothing can lose them."""

    def __init__(self, pod: Pod, holding: Holding, ledger: Ledger) -> None:
        self._pod = pod
        self._holding = holding
        self._ledger = ledger
        self._started = time.monotonic()
        # An attempt's number may come again, if Redis has lost its latest writes; a name never does.
        self._name = f"{folder(holding.id)}/{holding.attempt}-{secrets.token_hex(4)}"
        self._count = 0
        self._written: Written | None = None
        """Rows of which it is not certain that they are committed."""

    async def run(self) -> None:
        """Until all that will ever be a row is committed.

        Raises:
            BatchLost: another runner has the batch.
        """
        ledger = self._ledger
        while True:
            pause = max(OFTEN_S, RARELY * (time.monotonic() - self._started))
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await ledger.until(lambda: ledger.rows.full or ledger.drained)
            finished = ledger.drained
            await self.flush()
            if finished:
                return

    async def flush(self) -> None:
        """Commits all rows that there are. If it is cancelled it may be called again.

        Raises:
            BatchLost: another runner has the batch.
        """
        while self._written or self._ledger.rows:
            if self._written is None:
                self._count += 1
                self._written = self._ledger.rows.take(f"{self._name}-{self._count}")
                self._ledger.changed()
            await self._commit(self._written)
            self._written = None

    async def _commit(self, written: Written) -> None:
        for name, data in written.objects.items():
            await stored(partial(self._pod.files.storage.put, name, data))
        try:
            await persist(partial(self._holding.commit, written.results))
        except BatchLost:
            await self._discard(written)
            raise
        for start in range(0, len(written.streams), DELETED_AT_ONCE):
            some = written.streams[start : start + DELETED_AT_ONCE]
            await persist(partial(self._pod.streams.delete, some))

    async def _discard(self, written: Written) -> None:
        """Nobody lists these objects, and whoever ends the batch may have removed the others already."""
        try:
            for name in written.objects:
                await self._pod.files.storage.delete(name)
        except StorageError as error:
            logger.warning("an unlisted part is left behind: batch=%s %s", self._holding.id, error)
