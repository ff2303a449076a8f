"""Stored chat completions, and cancelling by id: each call at another pod than the last."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from arq.connections import ArqRedis
from openai import AsyncOpenAI

from llmboost import keys
from llmboost.streams import TokenStreams
from tests.turns import Turns
from tests.waiting import wait_until

from .answers import check_error, frames_of
from .api_pod import (
    CHAT,
    COMPLETIONS,
    MODEL,
    WORDS,
    RunningPod,
    ScriptedWorker,
    chat,
    ends,
    fails,
    loses,
    says,
    serving,
    settings_for,
    story,
    streamed,
)

ASKED: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}]}


@pytest.fixture
async def pods(redis_url: str, pod: RunningPod) -> AsyncIterator[Turns[AsyncOpenAI]]:
    async with serving(settings_for(redis_url)) as other:
        yield Turns(pod.openai, other.openai)


async def stored(pods: Turns[AsyncOpenAI], **fields: Any) -> str:
    completion = await pods.next.chat.completions.create(**ASKED, store=True, **fields)
    return completion.id


# Stored


async def test_a_stored_completion_is_retrieved_listed_changed_and_deleted(pods: Turns[AsyncOpenAI]) -> None:
    made = await pods.next.chat.completions.create(**ASKED, store=True, metadata={"topic": "cats"})
    assert made.metadata == {"topic": "cats"}
    again = await pods.next.chat.completions.retrieve(made.id)
    assert again == made
    listed = await pods.next.chat.completions.list()
    assert listed.data == [made]
    messages = await pods.next.chat.completions.messages.list(made.id)
    assert [(each.role, each.content) for each in messages.data] == [("user", "Tell me a story.")]
    assert messages.data[0].id.startswith("msg_")
    changed = await pods.next.chat.completions.update(made.id, metadata={"topic": "dogs"})
    assert changed.metadata == {"topic": "dogs"}
    assert (await pods.next.chat.completions.retrieve(made.id)).metadata == {"topic": "dogs"}
    gone = await pods.next.chat.completions.delete(made.id)
    assert (gone.id, gone.deleted, gone.object) == (made.id, True, "chat.completion.deleted")
    with pytest.raises(openai.NotFoundError):
        await pods.next.chat.completions.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await pods.next.chat.completions.delete(made.id)
    assert (await pods.next.chat.completions.list()).data == []


async def test_a_stream_is_stored_too(pods: Turns[AsyncOpenAI]) -> None:
    stream = await pods.next.chat.completions.create(**ASKED, store=True, stream=True)
    ids = {chunk.id async for chunk in stream}
    listed = await pods.next.chat.completions.list()
    assert {each.id for each in listed.data} == ids
    assert listed.data[0].choices[0].message.content == "".join(WORDS)


async def test_what_is_not_to_be_stored_is_not_listed(pods: Turns[AsyncOpenAI]) -> None:
    await pods.next.chat.completions.create(**ASKED)
    await pods.next.chat.completions.create(**ASKED, store=False)
    assert (await pods.next.chat.completions.list()).data == []


async def test_a_stored_completion_outlives_the_retention(
    redis_url: str, redis: ArqRedis, worker: ScriptedWorker
) -> None:
    """It is kept for `--response-ttl` after its end, stream and record."""
    async with serving(settings_for(redis_url, retention=5, response_ttl=1000)) as pod:
        kept = (await pod.openai.chat.completions.create(**ASKED, store=True)).id
        other = (await pod.openai.chat.completions.create(**ASKED)).id
    for key, ttl in (
        (keys.stream(kept), 1000),
        (keys.stored(kept), 1000),
        (keys.stored_by(""), 1000),
        (keys.stream(other), 60),
    ):
        assert 0 < await redis.ttl(key) <= ttl + 3600, key
    assert await redis.ttl(keys.stream(kept)) > 900


async def test_a_list_comes_in_pages_of_either_order_and_filtered(pods: Turns[AsyncOpenAI]) -> None:
    made = [await stored(pods, metadata={"n": str(number % 2)}) for number in range(5)]
    assert [each.id async for each in pods.next.chat.completions.list(limit=2)] == made
    backwards = pods.next.chat.completions.list(limit=2, order="desc")
    assert [each.id async for each in backwards] == made[::-1]
    odd = pods.next.chat.completions.list(limit=1, metadata={"n": "1"})
    assert [each.id async for each in odd] == made[1::2]
    page = await pods.next.chat.completions.list(limit=2, after=made[1])
    assert ([each.id for each in page.data], page.has_more) == (made[2:4], True)
    assert (await pods.next.chat.completions.list(model="another")).data == []
    assert len((await pods.next.chat.completions.list(model=MODEL)).data) == 5


async def test_any_metadata_can_be_looked_for(pods: Turns[AsyncOpenAI]) -> None:
    """Keys and values are text, whatever else a query uses of it."""
    metadata = {"user-id": "a&b=c", "a.b c": "ü/", "x[y]": "[]"}
    made = await stored(pods, metadata=metadata)
    await stored(pods, metadata={"user-id": "a"})
    for wanted in (*({key: metadata[key]} for key in metadata), metadata):
        page = await pods.next.chat.completions.list(metadata=wanted)
        assert [completion.id for completion in page.data] == [made]


async def test_whoever_deletes_while_listing_misses_nothing(pods: Turns[AsyncOpenAI]) -> None:
    made = {await stored(pods) for _ in range(7)}
    for order in ("asc", "desc"):
        deleted = []
        async for each in pods.next.chat.completions.list(limit=2, order=order):
            await pods.next.chat.completions.delete(each.id)
            deleted.append(each.id)
        assert set(deleted) == made
        made = {await stored(pods) for _ in range(7)}


async def test_only_complete_completions_are_listed(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Not those that failed, nor those that run."""
    worker.script = lambda job: [fails("It broke.")]
    failed = await pod.http.post(CHAT, json=chat(store=True))
    assert failed.status_code == 500
    ready = asyncio.Event()
    worker.script = lambda job: [*says(WORDS), ready.wait(), ends()]
    async with pod.begun(CHAT, streamed(CHAT, store=True)) as stream:
        assert (await pod.openai.chat.completions.list()).data == []
        response = await pod.http.post(f"{CHAT}/{worker.jobs[-1].id}", json={"metadata": {}})
        check_error(response, 409, "completion_not_complete", "completion_id")
        ready.set()
        await stream.finish()
    assert len((await pod.openai.chat.completions.list()).data) == 1


async def test_one_that_has_lost_a_part_keeps_no_other_from_being_listed(
    pod: RunningPod, worker: ScriptedWorker
) -> None:
    """It is as one that failed, wherever it is asked for."""
    worker.script = loses
    check_error(await pod.http.post(CHAT, json=chat(store=True)), 500, "stream_gap", None)
    await wait_until(lambda: worker.finished == 1)
    worker.script = story
    whole = await pod.openai.chat.completions.create(**ASKED, store=True)
    assert (await pod.openai.chat.completions.list()).data == [whole]
    lost = f"{CHAT}/{worker.jobs[0].id}"
    check_error(await pod.http.get(lost), 500, "stream_gap", None)
    changed = await pod.http.post(lost, json={"metadata": {}})
    check_error(changed, 409, "completion_not_complete", "completion_id")


async def test_a_completion_belongs_to_the_key_that_made_it(redis_url: str, worker: ScriptedWorker) -> None:
    async with serving(settings_for(redis_url, api_key=("one", "two"))) as pod:
        one, two = (pod.openai.with_options(api_key=key) for key in ("one", "two"))
        made = await one.chat.completions.create(**ASKED, store=True)
        assert (await two.chat.completions.list()).data == []
        for call in (
            two.chat.completions.retrieve(made.id),
            two.chat.completions.update(made.id, metadata={"a": "b"}),
            two.chat.completions.messages.list(made.id),
            two.chat.completions.delete(made.id),
            two.post(f"/chat/completions/{made.id}/cancel", cast_to=object),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert len((await one.chat.completions.list()).data) == 1


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("colour=red", "colour"),
        ("metadata=red", "metadata"),
        ("metadata=red&metadata[a]=b", "metadata"),
        ("metadata[]=red&metadata[a]=b", "metadata"),
        ("limit=1&limit[]=2", "limit"),
        ("after=chatcmpl-1", "after"),
        ("after=resp_6b0747c6f79354ada646fd24f2c0f59a", "after"),
    ],
)
async def test_a_wrong_query_is_named(pod: RunningPod, query: str, param: str) -> None:
    response = await pod.http.get(f"{CHAT}?{query}")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    "metadata", [{"a": 1}, {"k" * 65: "v"}, {"k": "v" * 513}, {str(number): "" for number in range(17)}, "x"]
)
async def test_metadata_keeps_to_its_limits(pod: RunningPod, metadata: Any) -> None:
    response = await pod.http.post(CHAT, json=chat(store=True, metadata=metadata))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "metadata"


# Cancelling


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_any_pod_cancels_at_the_next_token(
    path: str, redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """The reader's stream ends in an error, without `[DONE]`; the worker learns from its next append."""
    words = says(["a", "b", "c"])
    worker.script = lambda job: [*words[:2], wait_until(lambda: cancelled), words[2]]
    cancelled: list[dict[str, Any]] = []
    async with serving(settings_for(redis_url)) as other, pod.begun(path, streamed(path)) as stream:
        job_id = worker.jobs[0].id
        response = await other.http.post(f"{path}/{job_id}/cancel")
        cancelled.append(response.json())
        text = await stream.finish()
        again = await pod.http.post(f"{path}/{job_id}/cancel")
    kind = "chat.completion" if path == CHAT else "text_completion"
    assert cancelled == [{"id": job_id, "object": f"{kind}.cancelled", "cancelled": True}]
    assert again.json()["cancelled"] is False
    error = frames_of(text)[-1].json["error"]
    assert (error["code"], error["type"]) == ("cancelled", "request_cancelled")
    await wait_until(lambda: job_id in worker.stopped)


async def test_a_cancelled_answer_that_is_not_streamed_is_an_error(
    pod: RunningPod, worker: ScriptedWorker, streams: TokenStreams
) -> None:
    worker.script = lambda job: [*says(["a"], reason=None), wait_until(lambda: asked.done())]
    asked = asyncio.create_task(pod.http.post(CHAT, json=chat()))
    await wait_until(lambda: worker.jobs)
    cancelled = await pod.http.post(f"{CHAT}/{worker.jobs[0].id}/cancel")
    assert cancelled.json()["cancelled"]
    response = await asked
    check_error(response, 499, "cancelled")
    assert response.headers["x-should-retry"] == "false"


async def test_a_queued_request_is_cancelled_before_it_runs(redis_url: str, redis: ArqRedis) -> None:
    async with serving(settings_for(redis_url)) as pod:
        await ScriptedWorker(redis, pod.server.config.app.state.pod.queue).announce()  # type: ignore[union-attr]
        asked = asyncio.create_task(pod.http.post(CHAT, json=chat()))
        queue = keys.queue("llama", "interactive")
        await wait_until(lambda: redis.zcard(queue))
        job_id = (await redis.zrange(queue, 0, 0))[0].decode()
        assert (await pod.http.post(f"{CHAT}/{job_id}/cancel")).json()["cancelled"]
        check_error(await asked, 499, "cancelled")
        assert not await redis.zcard(queue)


async def test_what_was_never_there_can_not_be_cancelled(pod: RunningPod) -> None:
    response = await pod.http.post(f"{CHAT}/chatcmpl-123/cancel")
    check_error(response, 404, "completion_not_found", "completion_id")
