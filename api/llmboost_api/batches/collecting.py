"""Sealed streams of a batch's lines into rows.

Whoever seals a stream pushes its id onto the batch's list. That is a hint: it may be lost on its way, or with
the runner that took it. So now and then the streams themselves are looked at.

A server of Redis that was killed may come back without the end of its log: without a stream, or its seal, or
tokens in it. Nobody has read those, so such a line is begun again.
"""

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from functools import partial
from typing import Any, cast

from llmboost import keys
from llmboost.connection import BLOCK_S
from llmboost.entries import GAP, REQUEST_LOST, Queued, ReadEntry, Terminal
from llmboost.queue import DEADLINE_ERROR
from llmboost.streams import persist
from llmboost_api import errors
from llmboost_api.answer import Answer
from llmboost_api.batches.feeding import Feeder
from llmboost_api.batches.ledger import InFlight, Ledger
from llmboost_api.batches.output import Ending, Row, RowWriter
from llmboost_api.batches.record import Batch
from llmboost_api.errors import ApiError
from llmboost_api.pod import Pod
from llmboost_api.protocol.form import decode_form

logger = logging.getLogger(__name__)

HINTS = 64
"""Taken at once."""
FIRST_LOOK_S, RAREST_LOOK_S = 0.25, 10.0
"""Seconds of silence after which the streams are looked at: twice as many after each look in vain."""
LOOKED_AT = 64
"""Streams looked at in one round trip."""

MOST_AGAIN = 5
"""So often a line is begun again whose answer was lost. If it still is, the reason must be another one."""

_ENDINGS = {ending.code: ending for ending in Ending}
_LOST = {REQUEST_LOST.code, GAP.code}


class Collector:
    """Takes in the results of one batch's lines."""

    def __init__(self, pod: Pod, batch: Batch, ledger: Ledger, feeder: Feeder) -> None:
        self._pod = pod
        self._batch = batch
        self._ledger = ledger
        self._feeder = feeder
        self._writer = RowWriter(batch.id)
        self._lost: Counter[int] = Counter()
        """Answers, by the number of their line."""
        self._patience = FIRST_LOOK_S
        self._news_at = self._looked_at = time.monotonic()

    async def run(self) -> None:
        """Until nothing is in flight, nor will be."""
        ledger = self._ledger
        while True:
            await ledger.until(lambda: len(ledger) > 0 or ledger.fed)
            if not len(ledger):
                return
            hints = await persist(self._hints)
            for job_id in hints:
                await self._take(job_id)
            if hints:
                self._news_at = time.monotonic()
            elif self._silence >= self._patience or time.monotonic() - self._looked_at > RAREST_LOOK_S:
                await self._look()

    @property
    def _silence(self) -> float:
        return time.monotonic() - max(self._news_at, self._looked_at)

    async def _hints(self) -> list[str]:
        """Ids of streams that have been sealed; waits for one."""
        key = keys.batch_sealed(self._batch.id)
        seconds = min(max(self._patience - self._silence, 0.05), BLOCK_S)
        first: Any = await cast("Awaitable[Any]", self._pod.redis.blpop([key], timeout=cast(int, seconds)))
        if first is None:
            return []
        more: Any = await cast("Awaitable[Any]", self._pod.redis.lpop(key, HINTS))
        return [job_id.decode() for job_id in (first[1], *(more or ()))]

    async def _look(self) -> None:
        """Looks at every stream in flight, for a hint may have been lost, or the stream."""
        found = 0
        open_jobs = [job_id for line in self._ledger if line.submitted for job_id in line.open]
        for start in range(0, len(open_jobs), LOOKED_AT):
            some = open_jobs[start : start + LOOKED_AT]
            states = await persist(partial(self._pod.streams.sealed, some))
            for job_id, sealed in zip(some, states, strict=True):
                if sealed is False:
                    continue
                found += 1
                if sealed:
                    await self._take(job_id)
                elif line := self._ledger.of_job(job_id):
                    await self._feeder.begin_again(line)
        self._patience = FIRST_LOOK_S if found else min(2 * self._patience, RAREST_LOOK_S)
        self._looked_at = time.monotonic()

    async def _take(self, job_id: str) -> None:
        """A job has ended. Once all of its line's have, the line has its result."""
        ledger = self._ledger
        line = ledger.of_job(job_id)
        if line is None or job_id not in line.open:
            return  # Known already; or the hint is older than this runner.
        line.open.discard(job_id)
        if line.open:
            return
        # Or it might be submitted again, for want of a reply, when its streams have been deleted.
        await ledger.until(lambda: line.submitted and not ledger.rows.full)
        streams = [await persist(partial(self._pod.streams.read, each)) for each in line.jobs]
        if not all(streams):
            await self._feeder.begin_again(line)
            return
        sealed = [isinstance(entries[-1][1], Terminal) for entries in streams]
        if not all(sealed):  # any more: it was lost, and somebody will seal them again
            line.open.update(job for job, is_sealed in zip(line.jobs, sealed, strict=True) if not is_sealed)
            return
        row = self._row(line, streams)
        if row is None:
            await persist(partial(self._pod.streams.delete, line.jobs))
            await self._feeder.begin_again(line)
            return
        ledger.add(row)
        ledger.end(line)

    def _row(self, line: InFlight, streams: Sequence[Sequence[ReadEntry]]) -> Row | None:
        """What a line's streams say; None if a part of it was lost."""
        try:
            first = streams[0][0][1]
            assert isinstance(first, Queued)
            answer = Answer(decode_form(first.form), line.completion_id)
            for job, entries in enumerate(streams):
                answer.take(job, entries)
            assert answer.ended
            status, text, usage = 200, answer.encode(), answer.usage
        except ApiError as error:
            if error.code in _LOST and self._lost[line.number] < MOST_AGAIN:
                self._lost[line.number] += 1
                return None
            if ending := self._ending(error):
                data = self._writer.not_run(line.number, line.custom_id, ending)
                return Row(line.number, data, ending, failed=True, streams=line.jobs)
            status, text, usage = error.status, error.body(), None
        except Exception:  # one line must not keep the others from being written
            logger.exception("internal error: batch=%s line=%d", self._batch.id, line.number)
            status, text, usage = 500, errors.internal(line.completion_id).body(), None
        data = self._writer.response(line.number, line.custom_id, line.completion_id, status, text)
        return Row(line.number, data, failed=status != 200, usage=usage, streams=line.jobs)

    def _ending(self, error: ApiError) -> Ending | None:
        """Why the line was given up, if it was."""
        if error.code == DEADLINE_ERROR.code:  # The reaper was there first.
            return Ending.EXPIRED
        return _ENDINGS.get(error.code or "")
