"""A batch takes no more memory for more lines."""

import tracemalloc
from collections.abc import AsyncIterator, Iterator

import pytest
from arq.connections import ArqRedis

from llmboost.jobs import GenerationJob
from llmboost_api.batches import holding
from llmboost_api.batches.execution import Execution
from llmboost_api.batches.store import BatchStore
from llmboost_api.pod import Pod

from .api_pod import ScriptedWorker, Step, chat, settings_for, story
from .batch_inputs import begin_at, line
from .mortal import Fate, mortal_pod

LINE_BYTES = 10_000


async def peak_of(pod: Pod, lines: int) -> int:
    """Bytes that running a batch takes at most."""
    body = chat(user="x" * LINE_BYTES)

    async def content() -> AsyncIterator[bytes]:
        for number in range(lines):
            yield f"{line(f'line-{number}', body)}\n".encode()

    record = await begin_at(pod, content())
    (hold,) = await holding.claim(pod.redis, "runner", 1)
    tracemalloc.start()
    try:
        await Execution(pod, hold).run()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    batch = await BatchStore(pod.redis, pod.settings.response_ttl).get(record.id)
    assert batch is not None
    assert (batch.progress.status, batch.progress.completed) == ("completed", lines)
    return peak


@pytest.mark.timeout(120)
async def test_constant_memory(
    redis_url: str, redis: ArqRedis, worker: ScriptedWorker, tmp_path: object
) -> None:
    """Five times as many lines take no more, for neither requests nor results are kept."""

    def script(job: GenerationJob) -> Iterator[Step]:
        worker.jobs.clear()
        worker.playing[:] = [task for task in worker.playing if not task.done()]
        yield from story(job)

    worker.script = script
    async with mortal_pod(settings_for(redis_url, files_url=str(tmp_path)), Fate()) as pod:
        few = await peak_of(pod, 300)
        many = await peak_of(pod, 1500)
    assert many - few < 1200 * LINE_BYTES / 5
