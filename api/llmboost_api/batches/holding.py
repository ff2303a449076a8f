"""Batches in Redis, as runners deal with them: one runner at a time holds a batch, and only it changes it.

A runner claims a batch under a lease, which it renews. When the lease has lapsed any runner may claim it,
under the next attempt number; from then on every script refuses the one before, whatever it has still under
way. So what a script does, it does for the one holder, and it may be sent again if its outcome is unknown.

Results are written into objects first, and then committed by one script: it lists the objects, and marks
their lines as done. An object that is not listed does not exist for anyone, and a line that is marked is
never run again. So each line is in one listed object, whoever is killed in between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.asyncio import Redis

from llmboost import keys
from llmboost.entries import Usage
from llmboost.lua import Script, Value
from llmboost_api.batches import scripts
from llmboost_api.batches.record import ENDED, Batch, Problem, Status, hash_of
from llmboost_api.files.catalogue import publication
from llmboost_api.files.record import FileRecord

LEASE_S = 5.0
RENEW_EVERY_S = 1.0
"""Also how long it takes a runner to learn that its batch is cancelled."""


class BatchLost(Exception):
    """Another runner holds the batch, or it is gone: this one may change nothing more."""


@dataclass(frozen=True, slots=True)
class Part:
    """An object with results."""

    name: str
    failed: bool
    """Whether they go into the error file."""


@dataclass(frozen=True, slots=True)
class Results:
    """What one commit adds to a batch."""

    parts: Sequence[Part]
    lines: Sequence[int]
    """Their numbers, from 1."""
    completed: int
    failed: int
    expired: int
    """Of the failed ones."""
    usage: Usage


@dataclass(frozen=True, slots=True)
class ArqJob:
    """A job for an arq worker, to be enqueued when a batch ends."""

    queue: str
    id: str
    definition: bytes


async def claim(redis: Redis, holder: str, count: int) -> "list[Holding]":
    """Takes up to so many batches that nobody holds, those that have waited longest first."""
    taken = await scripts.CLAIM(redis, [keys.BATCHES], [holder, _ms(LEASE_S), count, keys.batch("")])
    return [Holding(redis, batch_id.decode(), holder, attempt) for batch_id, attempt in taken]


class Holding:
    """One runner's hold on one batch.

    Methods that change anything raise `BatchLost` if it is over. All may be called again if their outcome is
    unknown.
    """

    def __init__(self, redis: Redis, batch_id: str, holder: str, attempt: int) -> None:
        self.redis = redis
        self.id = batch_id
        self.holder = holder
        self.attempt = attempt

    # The lease

    async def renew(self) -> str:
        """Extends the lease; returns the batch's status."""
        status: bytes = await self._do(scripts.RENEW, [keys.BATCHES], [self.id, _ms(LEASE_S)])
        return status.decode()

    async def release(self, pause: float = 0) -> None:
        """Lets any runner take it at once, or after so many seconds."""
        await self._do(scripts.RELEASE, [keys.BATCHES], [self.id, _ms(pause)])

    # What is there

    async def get(self) -> Batch | None:
        """The batch; None if it is not kept any more."""
        return Batch.of(await hash_of(self.redis, self.id))

    async def lines_done(self) -> bytes:
        """The bitmap of lines that are in a part. Nobody but the holder can add to it."""
        bitmap: bytes = await self._do(scripts.LINES_DONE, [keys.batch_lines(self.id)], [])
        return bitmap

    async def done_elsewhere(self) -> bytes | None:
        """The same, if another runner holds the batch; None if it has ended."""
        async with self.redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(keys.batch(self.id))
            pipe.get(keys.batch_lines(self.id))
            fields, bitmap = await pipe.execute()
        batch = Batch.of(fields)
        return None if batch is None or batch.progress.status in ENDED else bitmap or b""

    async def parts(self) -> list[Part]:
        """All that are committed, in order."""
        return [_part(name) for name in await self.redis.zrange(keys.batch_parts(self.id), 0, -1)]

    # What is done

    async def begin(self, total: int, model: str | None) -> None:
        """Its lines have been validated, and are so many."""
        await self._do(scripts.BEGIN, [], [total, model or ""])

    async def commit(self, results: Results) -> None:
        """Adds results, whose parts have been written."""
        usage = results.usage
        await self._do(
            scripts.COMMIT,
            [keys.batch_lines(self.id), keys.batch_parts(self.id)],
            [
                len(results.parts),
                results.completed,
                results.failed,
                results.expired,
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                *(_member(part) for part in results.parts),
                *results.lines,
            ],
        )

    async def finalize(self) -> Status | None:
        """Its lines are done, so that it can only end, and in which status; None: some are not."""
        outcome: bytes = await self._do(scripts.FINALIZE, [], [])
        return None if outcome == b"incomplete" else msgspec.convert(outcome.decode(), Status)

    async def finish(
        self,
        status: Status,
        ttl: float,
        *,
        output: FileRecord | None = None,
        error: FileRecord | None = None,
        problems: Sequence[Problem] = (),
        job: ArqJob | None = None,
    ) -> None:
        """Ends it: makes its files known, whose bytes have been written, and enqueues what follows."""
        names: list[str] = []
        values: list[Value] = []
        for field, record in (("output_file_id", output), ("error_file_id", error)):
            if record is not None:
                file_keys, file_values = publication(record)
                names += file_keys
                values += [field, *file_values]
        if job is not None:
            names += [keys.arq_job(job.id), job.queue]
            values += [job.id, job.definition]
        errors = msgspec.json.encode(list(problems)) if problems else b""
        files = (output is not None) + (error is not None)
        await self._do(scripts.FINISH, names, [status, _ms(ttl), errors, files, *values])

    async def forget(self) -> None:
        """Nothing is left to do: removes what only runners need."""
        await self._do(
            scripts.FORGET,
            [
                keys.BATCHES,
                keys.batch_lines(self.id),
                keys.batch_parts(self.id),
                keys.batch_sealed(self.id),
            ],
            [self.id],
        )

    async def _do(self, script: Script, names: Sequence[str], values: Sequence[Value]) -> Any:
        reply = await script(self.redis, [keys.batch(self.id), *names], [self.holder, self.attempt, *values])
        if reply is None:
            raise BatchLost(f"{self.id}: attempt {self.attempt} of {self.holder} is over")
        return reply


def _member(part: Part) -> str:
    return f"{'error' if part.failed else 'output'}:{part.name}"


def _part(member: bytes) -> Part:
    kind, _, name = member.decode().partition(":")
    return Part(name, failed=kind == "error")


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
