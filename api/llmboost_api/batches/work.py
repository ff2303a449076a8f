"""One runner's work on the lines of a batch, until the result of each is in a part: three tasks and a ledger.

The feeder begins lines, the collector takes in their results, the committer brings these into parts. A fourth
waits for what ends the batch early.
"""

import asyncio
from contextlib import suppress

from llmboost.jobs import now
from llmboost.streams import persist
from llmboost_api.batches.collecting import Collector
from llmboost_api.batches.committing import Committer
from llmboost_api.batches.feeding import Feeder, has_line
from llmboost_api.batches.holding import Holding
from llmboost_api.batches.ledger import Ledger
from llmboost_api.batches.output import Ending
from llmboost_api.batches.record import Batch, Problem
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import Endpoint


class Work:
    """Runs the lines of a batch that is held."""

    def __init__(
        self, pod: Pod, holding: Holding, batch: Batch, endpoint: Endpoint, cancelling: asyncio.Event
    ) -> None:
        self._pod = pod
        self._holding = holding
        self._batch = batch
        self._cancelling = cancelling
        self._ledger = Ledger()
        self._feeder = Feeder(pod, batch, endpoint, self._ledger)
        self._collector = Collector(pod, batch, self._ledger, self._feeder)
        self._committer = Committer(pod, holding, self._ledger)

    async def run(self) -> Problem | None:
        """Until every line is done, or given up because the batch is cancelled or expires.

        Returns why it can't be run to its end, if it can't; what is done is committed all the same.

        Raises:
            ExceptionGroup: of `BatchLost`, if another runner has it.
        """
        done = await persist(self._holding.lines_done)
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._watch())
            group.create_task(self._feeder.run(done))
            group.create_task(self._collector.run())
            await self._committer.run()
            watcher.cancel()
        return self._ledger.problem

    async def save(self) -> None:
        """Commits what there is, when `run` has been cancelled.

        Raises:
            BatchLost: another runner has it.
        """
        await self._committer.flush()

    async def withdraw(self) -> None:
        """Another runner has the batch: removes what this one has made that the other does not know of, or
        needs no more."""
        await self._committer.discard()
        done = await persist(self._holding.done_elsewhere)
        for line in self._ledger:
            if done is None or has_line(done, line.number):
                await self._feeder.give_up(line, Ending.CANCELLED)
                await self._pod.streams.delete(line.jobs)
        for row in self._committer.uncommitted:
            if done is None or has_line(done, row.number):
                await self._pod.streams.delete(row.streams)

    async def _watch(self) -> None:
        """Ends the batch early, if it is cancelled or its window closes."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self._batch.record.deadline - now())):
                await self._cancelling.wait()
        ending = Ending.CANCELLED if self._cancelling.is_set() else Ending.EXPIRED
        self._ledger.ending = ending
        self._ledger.changed()
        for line in self._ledger:
            await self._feeder.give_up(line, ending)
