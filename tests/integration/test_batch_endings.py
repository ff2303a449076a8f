"""Batches that end before their lines are done: cancelled, expired, or without their input."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest
from arq.connections import ArqRedis
from openai import ConflictError

from llmboost import keys
from llmboost.jobs import GenerationJob
from tests.waiting import wait_until

from .api_pod import ROOT, WORDS, RunningPod, ScriptedWorker, Step, chat, ends, says, serving, settings_for
from .batch_inputs import begin, ended, lines, outcome


@dataclass
class Held:
    """What a worker says, but for long requests only when the test lets it."""

    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, job: GenerationJob) -> Iterator[Step]:
        begun = 0
        if job.sampling.max_tokens == 2:
            begun = 2
            yield from says(WORDS[:begun], reason=None)
            yield self.gate.wait()
        yield from [*says(WORDS)[begun:], ends()]


@pytest.fixture
async def held(worker: ScriptedWorker) -> AsyncIterator[Held]:
    """What the worker says; at the end it has nothing left to do."""
    worker.script = held = Held()
    yield held
    held.gate.set()
    await wait_until(lambda: worker.finished == len(worker.jobs))


def some_long(number: int) -> dict[str, object]:
    """The body of a line: the first three are short."""
    return chat(max_tokens=2 if number > 3 else 1)


async def test_cancelling(pod: RunningPod, worker: ScriptedWorker, held: Held) -> None:
    """What is done stays done, what runs is ended, and of the rest each line has a row that says so."""

    batch = await begin(pod.openai, lines(200, some_long))

    async def some_done() -> bool:
        counts = (await pod.openai.batches.retrieve(batch.id)).request_counts
        return counts is not None and counts.completed == 3

    await wait_until(some_done)
    assert len(worker.jobs) < 200
    cancelling = await pod.openai.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert cancelling.cancelling_at is not None
    found = await outcome(pod.openai, batch.id, within=5)
    assert found.batch.status == "cancelled"
    assert found.batch.cancelled_at is not None
    assert found.counts == (200, 3, 197)
    assert len(found.output) == 3
    assert len(found.errors) == 197
    row = found.errors["line-150"]
    assert row["response"] is None
    assert row["error"]["code"] == "batch_cancelled"
    with pytest.raises(ConflictError):
        await pod.openai.batches.cancel(batch.id)


async def test_cancelled_twice(pod: RunningPod, held: Held) -> None:
    """The second time changes nothing."""
    batch = await begin(pod.openai, lines(2, lambda _: chat(max_tokens=2)))
    first = await pod.openai.batches.cancel(batch.id)
    second = await pod.openai.batches.cancel(batch.id)
    assert first.cancelling_at == second.cancelling_at
    assert (await ended(pod.openai, batch.id)).status == "cancelled"


async def test_the_window_closes(pod: RunningPod, held: Held, redis: ArqRedis) -> None:
    """What is not done in time is reported as expired, line by line; nothing of it goes on."""

    batch = await begin(pod.openai, lines(100, some_long), window="3s")
    found = await outcome(pod.openai, batch.id, within=10)
    assert found.batch.status == "expired"
    assert found.batch.expired_at is not None
    assert found.counts == (100, 3, 97)
    for row in found.errors.values():
        assert row["response"] is None
        assert row["error"] == {
            "code": "batch_expired",
            "message": "This request could not be executed before the completion window expired.",
        }
    assert not await redis.exists(keys.OPEN, keys.queue(ROOT, "batch"))


async def test_without_a_worker(redis_url: str, redis: ArqRedis) -> None:
    """Lines wait for a worker until the window closes."""
    await ScriptedWorker(redis, None).announce()  # type: ignore[arg-type]
    async with serving(settings_for(redis_url)) as pod:
        batch = await begin(pod.openai, lines(3), window="1s")
        found = await outcome(pod.openai, batch.id, within=10)
    assert found.batch.status == "expired"
    assert {row["error"]["code"] for row in found.errors.values()} == {"batch_expired"}


async def test_the_input_is_deleted(pod: RunningPod, worker: ScriptedWorker, held: Held) -> None:
    """The batch fails, names the file, and what was done is in the output all the same."""
    long = chat(user="x" * 100_000, max_tokens=2)
    batch = await begin(pod.openai, lines(100, lambda _: long))
    await wait_until(lambda: len(worker.jobs) >= 16)
    await pod.openai.files.delete(batch.input_file_id)
    held.gate.set()
    found = await outcome(pod.openai, batch.id)
    assert found.batch.status == "failed"
    assert found.batch.errors is not None
    (error,) = found.batch.errors.data or []
    assert error.code == "input_file_not_found"
    assert error.message is not None
    assert batch.input_file_id in error.message
    assert 0 < len(found.output) == len(worker.jobs) < 100
