"""Workers, whole but for their model, in the test's own process."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.entries import Delta, Terminal
from llmboost.jobs import GenerationJob, Prompt
from llmboost.queue import JobQueue
from llmboost.settings import WorkerSettings
from llmboost.streams import TokenStreams
from llmboost.transcript import Transcript
from llmboost_worker.engine.interface import SequenceRequest
from llmboost_worker.text import Tokenizer, encode_prompt
from llmboost_worker.worker import WorkerProcess
from tests.engines import ScriptedEngine, scripted_token
from tests.jobs import MODEL, make_job
from tests.unit.text_tokenizers import byte_level
from tests.waiting import wait_until

RETENTION_S = 60.0
LEASE_S = 0.5
GRACE_S = 0.5


@dataclass
class RunningWorker:
    process: WorkerProcess
    engine: ScriptedEngine
    task: "asyncio.Task[None]"

    async def terminate(self) -> None:
        """SIGTERM, as arq handles it."""
        self.process.arq.handle_sig(15)
        await asyncio.gather(self.task, return_exceptions=True)
        await self.process.arq.close()


class StartWorker(Protocol):
    """Starts a worker, ready to serve, whose engine has so many slots."""

    async def __call__(self, slots: int = 8) -> RunningWorker: ...


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_level()


@pytest.fixture
def vocabulary(tokenizer: Tokenizer) -> list[int]:
    """Tokens of whole, plain characters."""
    return sorted({i for word in ("alpha", " beta", "gamma", " x", "y") for i in ids(tokenizer, word)})


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return encode_prompt(tokenizer, Prompt(text=text, add_special_tokens=False))


@pytest.fixture
async def start_worker(
    redis: ArqRedis, redis_url: str, tokenizer: Tokenizer, vocabulary: list[int]
) -> AsyncIterator[StartWorker]:
    """Starts workers on one queue; each has its own engine, which steps when told to."""
    workers: list[RunningWorker] = []

    async def start(slots: int = 8) -> RunningWorker:
        engine = ScriptedEngine(vocabulary, max_num_seqs=slots, eos=ids(tokenizer, "!")[0])
        settings = WorkerSettings(
            redis_url=redis_url, model=MODEL, lease=LEASE_S, grace=GRACE_S, retention=RETENTION_S
        )
        process = WorkerProcess(settings, load=lambda _: (engine, tokenizer))
        worker = RunningWorker(process, engine, asyncio.create_task(process.arq.async_run()))
        workers.append(worker)
        await wait_until(lambda: registered(redis, process))
        return worker

    yield start
    for worker in workers:
        if not worker.engine.closed:
            await worker.terminate()
    streams = TokenStreams(redis, RETENTION_S)
    for job_id in await redis.zrange(keys.OPEN, 0, -1):
        await JobQueue(redis, streams).cancel(job_id.decode(), Terminal("test"))


async def registered(redis: ArqRedis, process: WorkerProcess) -> bool:
    """Whether the worker serves, and says so."""
    return await redis.zscore(keys.WORKERS, process.id) is not None


async def transcript(streams: TokenStreams, job: GenerationJob) -> Transcript:
    result = Transcript()
    for entry_id, entry in await streams.read(job.id):
        result.apply(entry_id, entry)
    return result


async def text(streams: TokenStreams, job: GenerationJob, index: int = 0) -> str:
    deltas = [entry for _, entry in await streams.read(job.id) if isinstance(entry, Delta)]
    return "".join(choice.text for delta in deltas for choice in delta.choices if choice.index == index)


async def ended(streams: TokenStreams, job: GenerationJob) -> Terminal:
    result: list[Transcript] = []

    async def sealed() -> bool:
        result[:] = [await transcript(streams, job)]
        return result[0].terminal is not None

    await wait_until(sealed)
    assert result[0].terminal is not None
    return result[0].terminal


def expected_ids(job: GenerationJob, worker: RunningWorker, tokenizer: Tokenizer, count: int) -> list[int]:
    """What an unbroken run of the first choice generates."""
    request = SequenceRequest("", encode_prompt(tokenizer, job.prompt), job.sampling)
    return [scripted_token(request, position, worker.engine.vocabulary) for position in range(count)]


async def step_until(worker: RunningWorker, condition: Callable[[], Awaitable[bool] | bool]) -> None:
    """Steps the engine until the condition holds."""

    async def stepped() -> bool:
        worker.engine.step()
        value = condition()
        return await value if asyncio.iscoroutine(value) else bool(value)

    await wait_until(stepped)


async def submit(queue: JobQueue, **fields: object) -> GenerationJob:
    job = make_job(**{"needs_audience": False, "max_tokens": 12, **fields})
    await queue.submit(job)
    return job


async def running(worker: RunningWorker, count: int = 1) -> None:
    await wait_until(lambda: len(worker.engine.sequences) == count)


async def emitted(streams: TokenStreams, job: GenerationJob, count: int) -> bool:
    choices = (await transcript(streams, job)).choices
    return 0 in choices and len(choices[0].token_ids) >= count
