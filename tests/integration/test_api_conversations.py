"""Conversations: responses that follow one another, by the id of the last."""

import pytest
from arq.connections import ArqRedis
from openai import AsyncOpenAI, BadRequestError

from llmboost import keys
from llmboost.jobs import new_id
from tests.waiting import wait_until

from .api_pod import MODEL, WORDS, RunningPod, ScriptedWorker, chat, ends, fails, says, serving, settings_for
from .responses import Paused, get

STORY = "".join(WORDS)


async def test_a_conversation_goes_on(redis_url: str, pod: RunningPod, worker: ScriptedWorker) -> None:
    """By the id of the last response alone; instructions are not carried over; and though what came before
    has been deleted or has expired."""
    first = await pod.openai.responses.create(model=MODEL, input="One", instructions="Be brief.")
    async with serving(settings_for(redis_url)) as other:
        second = await other.openai.responses.create(model=MODEL, input="Two", previous_response_id=first.id)
    await pod.openai.responses.delete(first.id)
    third = await pod.openai.responses.create(
        model=MODEL, input="Three", previous_response_id=second.id, instructions="Shout."
    )
    user = [{"role": "user", "content": word} for word in ("One", "Two", "Three")]
    said = {"role": "assistant", "content": STORY}
    assert worker.jobs[1].prompt.messages == [user[0], said, user[1]]
    shout = {"role": "system", "content": "Shout."}
    assert worker.jobs[2].prompt.messages == [shout, user[0], said, user[1], said, user[2]]
    assert (third.previous_response_id, third.instructions) == (second.id, "Shout.")
    listed = await pod.openai.responses.input_items.list(third.id)
    assert [item.content[0].text for item in listed.data] == ["Three"]


async def test_what_can_not_be_followed(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis
) -> None:
    """One that was not stored, expired, was deleted, is another's, runs or failed: each is told apart."""

    async def refused(previous_id: str, code: str, says_so: str, client: AsyncOpenAI = pod.openai) -> None:
        with pytest.raises(BadRequestError, match=says_so) as error:
            await client.responses.create(model=MODEL, input="x", previous_response_id=previous_id)
        assert (error.value.code, error.value.param) == (code, "previous_response_id")

    missing = "previous_response_not_found"
    await refused(new_id("resp_"), missing, "not found")
    completion = await pod.openai.chat.completions.create(**chat(store=True))
    await refused(completion.id, missing, "not found")
    unstored = await pod.openai.responses.create(model=MODEL, input="x", store=False)
    await refused(unstored.id, missing, "not stored")
    expired = await pod.openai.responses.create(model=MODEL, input="x")
    await redis.delete(keys.stream(expired.id))
    await refused(expired.id, missing, "not found")
    deleted = await pod.openai.responses.create(model=MODEL, input="x")
    await pod.openai.responses.delete(deleted.id)
    await refused(deleted.id, missing, "not found")
    async with serving(settings_for(redis_url, api_key=("mine", "theirs"))) as keyed:
        mine, theirs = keyed.openai.with_options(api_key="mine"), keyed.openai.with_options(api_key="theirs")
        for store in (True, False):
            response = await mine.responses.create(model=MODEL, input="x", store=store)
            await refused(response.id, missing, "not found", theirs)
    worker.script = Paused()
    running = await pod.openai.responses.create(model=MODEL, input="x", background=True)
    await refused(running.id, "previous_response_not_finished", "still")
    worker.script.go.set()
    worker.script = lambda job: [fails()]
    failed = await pod.openai.responses.create(model=MODEL, input="x", background=True)

    async def has_failed() -> bool:
        return (await get(pod, failed.id)).status == "failed"

    await wait_until(has_failed)
    await refused(failed.id, "previous_response_failed", "failed")


async def test_what_was_cancelled_can_be_followed(pod: RunningPod, worker: ScriptedWorker) -> None:
    """It has said what it has said."""
    worker.script = paused = Paused()
    stopped = await pod.openai.responses.create(model=MODEL, input="One", background=True, stream=True)
    async for event in stopped:
        if event.type == "response.created":
            response_id = event.response.id
        if event.type == "response.output_text.delta":
            await pod.openai.responses.cancel(response_id)
    said = (await get(pod, response_id)).output_text
    worker.script = lambda job: [*says(WORDS), ends()]
    await pod.openai.responses.create(model=MODEL, input="Two", previous_response_id=response_id)
    assert worker.jobs[1].prompt.messages == [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Two"},
    ]
    paused.go.set()
