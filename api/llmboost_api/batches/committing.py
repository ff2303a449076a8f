"""Rows into parts: written, then committed, and only then are the streams that they came from forgotten."""

import asyncio
import secrets
import time
from contextlib import suppress
from functools import partial

from llmboost.streams import persist
from llmboost_api.batches.holding import Holding
from llmboost_api.batches.ledger import Ledger
from llmboost_api.batches.output import Row, Written
from llmboost_api.batches.source import folder, insist
from llmboost_api.pod import Pod

OFTEN_S = 1.0
RARELY = 0.02
"""Rows wait for a second, or for this part of the time that the batch has taken, if that is longer: so there
are not too many parts, and never much to do again."""


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

    @property
    def uncommitted(self) -> list[Row]:
        """Rows of which it is not certain that they are in a part."""
        return [*(self._written.rows if self._written else ()), *self._ledger.rows.rows]

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
            await insist(partial(self._pod.files.storage.put, name, data))
        await persist(partial(self._holding.commit, written.results))
        await persist(
            partial(self._pod.streams.delete, [stream for row in written.rows for stream in row.streams])
        )

    async def discard(self) -> None:
        """The batch is another runner's: removes what was written for it and not committed. That one may have
        removed everything else already."""
        if self._written is None:
            return
        # The commit may have been refused at the second try only.
        listed = {part.name for part in await persist(self._holding.parts)}
        for name in self._written.objects.keys() - listed:
            await insist(partial(self._pod.files.storage.delete, name))
