"""Whatever moment a runner is killed or frozen at, each line of its batch is in the output once."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress

import pytest
from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost import keys
from llmboost.jobs import GenerationJob
from llmboost.settings import ApiSettings
from llmboost.streams import persist
from llmboost_api.batches import collecting, execution, holding, output, source
from llmboost_api.batches.committing import Committer
from llmboost_api.batches.execution import Execution
from llmboost_api.batches.ledger import Ledger
from llmboost_api.batches.record import BatchRecord
from llmboost_api.batches.source import folder
from llmboost_api.batches.store import BatchStore
from llmboost_api.pod import Pod
from tests.waiting import wait_until

from .api_pod import ScriptedWorker, Step, chat, ends, says, settings_for
from .batch_inputs import begin_at, line
from .mortal import Fate, Killed, mortal_pod

LINES = 5
REFUSED = 4
"""The number of a line that the endpoint does not take."""
OPERATIONS = 30
"""Fewer than it takes to run the batch."""


@pytest.fixture
def settings(redis_url: str, tmp_path: object) -> ApiSettings:
    return settings_for(redis_url, files_url=str(tmp_path))


@pytest.fixture(autouse=True)
def no_time_to_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch can be taken over at once, whatever its runner may think; and it has many parts."""
    monkeypatch.setattr(output, "ROWS", 2)
    monkeypatch.setattr(holding, "LEASE_S", 0)
    monkeypatch.setattr(execution, "RENEW_EVERY_S", 0.02)
    monkeypatch.setattr(collecting, "FIRST_LOOK_S", 0.05)
    monkeypatch.setattr(source, "FIRST_S", 0.01)


def echo(job: GenerationJob) -> Iterator[Step]:
    """Says what it was asked."""
    assert job.prompt.messages is not None
    yield from says([f"{job.prompt.messages[-1]['content']} {job.sampling.seed}"])
    yield ends(1)


async def make_batch(pod: Pod) -> BatchRecord:
    """A batch that nobody has taken yet."""

    async def content() -> AsyncIterator[bytes]:
        for number in range(1, LINES + 1):
            messages = [{"role": "user", "content": f"Question {number}"}]
            body = chat(messages=messages, temperature=9 if number == REFUSED else 1)
            yield (line(f"line-{number}", body) + "\n").encode()

    return await begin_at(pod, content())


async def execute(pod: Pod, name: str) -> None:
    """Takes the one batch that there may be and runs it to the end, if it lives so long."""
    with suppress(Killed):
        for hold in await persist(lambda: holding.claim(pod.redis, name, 1)):
            with suppress(BaseExceptionGroup):
                await Execution(pod, hold).run()


async def check(pod: Pod, record: BatchRecord) -> None:
    """The batch has ended, with one row for each line, and nothing is left but its record and its files."""
    batch = await BatchStore(pod.redis, pod.settings.response_ttl).get(record.id)
    assert batch is not None
    assert batch.progress.status == "completed"
    assert (batch.progress.total, batch.progress.completed, batch.progress.failed) == (LINES, LINES - 1, 1)
    found = []
    for file_id in (batch.progress.output_file_id, batch.progress.error_file_id):
        assert file_id is not None
        file = await pod.files.get("", file_id)
        assert file is not None
        data = b"".join([piece async for piece in pod.files.read(file)])
        assert len(data) == file.bytes
        found.append([json.loads(row) for row in data.splitlines()])
    output, errors = found
    assert sorted(row["custom_id"] for row in output) == [
        f"line-{number}" for number in range(1, LINES + 1) if number != REFUSED
    ]
    for row in output:
        answer = row["response"]["body"]["choices"][0]["message"]["content"]
        assert answer.startswith(f"Question {row['custom_id'][-1]} ")
    (refused,) = errors
    assert refused["custom_id"] == f"line-{REFUSED}"
    assert refused["response"]["status_code"] == 400
    assert f"Line {REFUSED}: 'temperature'" in refused["response"]["body"]["error"]["message"]
    assert await pod.files.storage.list(folder(record.id)) == []
    assert not await pod.redis.exists(
        keys.BATCHES, keys.batch_lines(record.id), keys.batch_parts(record.id), keys.OPEN
    )


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_killed_at_every_operation(
    redis: ArqRedis, worker: ScriptedWorker, settings: ApiSettings, done: bool
) -> None:
    """A runner is killed at the first thing that it does, at the second, and so on, before that has an effect
    or after: the next one brings the batch to its end, and generates nothing that was generated already."""
    worker.script = echo
    last, survived = 1, False
    while not survived:
        worker.jobs.clear()
        async with mortal_pod(settings, Fate()) as pod:
            record = await make_batch(pod)
            fate = Fate(last, done=done)
            async with mortal_pod(settings, fate) as dying:
                await execute(dying, "first")
            survived = not fate.reached.is_set()
            if await redis.exists(keys.BATCHES):
                await execute(pod, "second")
            await check(pod, record)
        assert len(worker.jobs) == LINES - 1
        last += 1
    assert last > OPERATIONS


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_frozen_at_every_operation(
    redis: ArqRedis, worker: ScriptedWorker, settings: ApiSettings, done: bool
) -> None:
    """A runner is frozen at any thing that it does, and goes on when another has ended its batch: it changes
    nothing, and leaves nothing behind."""
    worker.script = echo
    last, survived = 1, False
    while not survived:
        fate = Fate(last, done=done, frozen=True)
        async with mortal_pod(settings, Fate()) as pod, mortal_pod(settings, fate) as zombie:
            record = await make_batch(pod)
            frozen = asyncio.create_task(execute(zombie, "first"))
            reached = asyncio.create_task(fate.reached.wait())
            await asyncio.wait([frozen, reached], return_when=asyncio.FIRST_COMPLETED)
            reached.cancel()
            survived = not fate.reached.is_set()
            if await redis.exists(keys.BATCHES):
                await execute(pod, "second")
            fate.thawed.set()
            await frozen
            await wait_until(lambda: worker.finished == len(worker.jobs))
            await check(pod, record)
            assert [key async for key in redis.scan_iter(match=keys.stream("*"))] == []
        last += 1
    assert last > OPERATIONS


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
async def test_failing_at_every_operation(
    redis: ArqRedis, worker: ScriptedWorker, settings: ApiSettings, done: bool
) -> None:
    """Anything that a runner does may fail in passing, with an effect or without: the same runner brings the
    batch to its end."""
    worker.script = echo
    last, survived = 1, False
    while not survived:
        worker.jobs.clear()
        fate = Fate(last, done=done, fails=True)
        async with mortal_pod(settings, Fate()) as pod, mortal_pod(settings, fate) as unlucky:
            record = await make_batch(pod)
            await execute(unlucky, "first")
            survived = not fate.reached.is_set()
            await check(pod, record)
        assert len(worker.jobs) == LINES - 1
        last += 1
    assert last > OPERATIONS


async def test_a_commit_whose_reply_was_lost(
    redis: ArqRedis, worker: ScriptedWorker, settings: ApiSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runner that loses its batch before it has heard of its commit takes back nothing that is in it."""
    async with mortal_pod(settings, Fate()) as pod:
        await make_batch(pod)
        (first,) = await holding.claim(pod.redis, "first", 1)
        await first.begin(LINES, None)
        commit = first.commit

        async def unheard(results: holding.Results) -> None:
            await commit(results)
            await holding.claim(pod.redis, "second", 1)
            raise RedisConnectionError

        monkeypatch.setattr(first, "commit", unheard)
        ledger = Ledger()
        committer = Committer(pod, first, ledger)
        ledger.add(output.Row(1, b"{}\n"))
        with pytest.raises(holding.BatchLost):
            await committer.flush()
        await committer.discard()
        (part,) = await first.parts()
        assert await pod.files.storage.exists(part.name)
        await execute(pod, "third")


async def test_what_follows_from_the_end(
    redis: ArqRedis, worker: ScriptedWorker, settings: ApiSettings
) -> None:
    """The script that ends a batch enqueues a job, once, however often it is sent."""
    job = holding.ArqJob("some:queue", "ended", b"definition")
    async with mortal_pod(settings, Fate()) as pod:
        record = await make_batch(pod)
        (hold,) = await holding.claim(pod.redis, "runner", 1)
        await hold.finish("failed", 60, job=job)
        enqueued = await redis.zrange("some:queue", 0, -1, withscores=True)
        await hold.finish("failed", 60, job=job)
        assert await redis.zrange("some:queue", 0, -1, withscores=True) == enqueued
        assert [name for name, _ in enqueued] == [b"ended"]
        assert await redis.get(keys.arq_job("ended")) == b"definition"
        await redis.delete("some:queue")
        await hold.forget()
        batch = await BatchStore(pod.redis, pod.settings.response_ttl).get(record.id)
        assert batch is not None
        assert batch.progress.status == "failed"
