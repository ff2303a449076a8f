"""Redis has come back without the end of its log: a line whose answer lost a part of it is begun again."""

import asyncio
from collections import Counter
from collections.abc import Iterable

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.entries import REQUEST_LOST
from llmboost.jobs import GenerationJob
from llmboost_api.batches.collecting import MOST_AGAIN
from tests.waiting import wait_until

from .api_pod import WORDS, RunningPod, Script, ScriptedWorker, Step, ends, fails, loses, says, story
from .batch_inputs import begin, lines, outcome

LOSSES: dict[str, Script] = {
    "tokens": loses,
    "its job": lambda job: [*says(WORDS)[:1], fails(REQUEST_LOST.message, code=REQUEST_LOST.code)],
}


def losing(lost: Script, times: int) -> Script:
    """Of each answer the first so many tries go like this."""
    tries: Counter[str] = Counter()

    def script(job: GenerationJob) -> Iterable[Step]:
        tries[job.id] += 1
        return (lost if tries[job.id] <= times else story)(job)

    return script


@pytest.mark.parametrize("lost", LOSSES)
async def test_a_line_is_begun_again(pod: RunningPod, worker: ScriptedWorker, lost: str) -> None:
    worker.script = losing(LOSSES[lost], times=MOST_AGAIN)
    batch = await begin(pod.openai, lines(3))
    found = await outcome(pod.openai, batch.id)
    assert found.counts == (3, 3, 0)
    assert [found.text(custom_id) for custom_id in found.output] == ["".join(WORDS)] * 3
    assert len(worker.jobs) == 3 * (1 + MOST_AGAIN)


async def test_a_line_that_is_lost_each_time_is_given_up(pod: RunningPod, worker: ScriptedWorker) -> None:
    """It must not go round for as long as the batch has time."""
    worker.script = loses
    batch = await begin(pod.openai, lines(1))
    found = await outcome(pod.openai, batch.id)
    assert found.errors["line-1"]["response"]["body"]["error"]["code"] == "stream_gap"
    assert len(worker.jobs) == 1 + MOST_AGAIN


async def test_a_lost_seal_is_waited_for(pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis) -> None:
    """The runner knew that a line was answered, but the end of its stream is not there any more."""
    going = asyncio.Event()
    worker.script = lambda job: [*says(WORDS[:1], reason=None), going.wait(), *says(WORDS)[1:], ends()]
    batch = await begin(pod.openai, lines(1))
    await wait_until(lambda: worker.jobs)
    hints = keys.batch_sealed(batch.id)
    await redis.rpush(hints, worker.jobs[0].id)

    async def taken() -> bool:
        return not await redis.exists(hints)

    await wait_until(taken)
    going.set()
    found = await outcome(pod.openai, batch.id)
    assert found.text("line-1") == "".join(WORDS)
