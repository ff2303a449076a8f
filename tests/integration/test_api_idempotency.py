"""`Idempotency-Key`: a request that is sent again generates nothing twice, whatever became of the first."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from arq.connections import ArqRedis
from openai import APIStatusError

from llmboost import keys
from llmboost.audience import NOBODY_READS
from llmboost.entries import REQUEST_LOST, StreamError, Terminal
from llmboost.queue import JobQueue
from llmboost_api import generation
from tests.waiting import wait_until

from .answers import check_error, events, id_in
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

KEY = {"idempotency-key": "7f1c"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_retry_returns_the_first_answer(
    path: str, redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """From any pod, whole or streamed, byte for byte; and nothing is generated a second time."""
    for stream in (False, True):
        body = streamed(path, stream=stream)
        headers = {"idempotency-key": f"key-{stream}"}
        first = await pod.http.post(path, json=body, headers=headers)
        async with serving(settings_for(redis_url)) as other:
            second = await other.http.post(path, json=body, headers=headers)
        assert first.status_code == second.status_code == 200
        assert second.content == first.content
        assert second.headers["x-request-id"] == first.headers["x-request-id"]
    assert len(worker.jobs) == 2


async def test_a_retry_joins_the_stream_that_runs(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker
) -> None:
    """It gets the beginning at once and the rest as it comes, beside the first reader."""
    going_on = asyncio.Event()
    words = says(WORDS)
    worker.script = lambda job: [*words[:2], going_on.wait(), *words[2:], ends()]
    body = streamed(CHAT)
    async with (
        serving(settings_for(redis_url)) as other,
        pod.http.stream("POST", CHAT, json=body, headers=KEY) as first,
        other.http.stream("POST", CHAT, json=body, headers=KEY) as second,
    ):
        texts = ["", ""]
        readers = [first.aiter_text(), second.aiter_text()]
        for number, reader in enumerate(readers):
            while len(events(texts[number])) < 2:
                texts[number] += await anext(reader)
        going_on.set()
        for number, reader in enumerate(readers):
            texts[number] += "".join([chunk async for chunk in reader])
    assert texts[0] == texts[1]
    assert texts[0].endswith("data: [DONE]\n\n")
    assert len(worker.jobs) == 1


async def test_a_retry_has_all_that_its_first_try_missed(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The client left in the middle and sends the request again: the audience is back."""
    going_on = asyncio.Event()
    words = says(WORDS)
    worker.script = lambda job: [words[0], going_on.wait(), *words[1:], ends()]
    async with pod.http.stream("POST", CHAT, json=streamed(CHAT), headers=KEY) as response:
        await anext(response.aiter_text())
    again = asyncio.create_task(pod.http.post(CHAT, json=streamed(CHAT), headers=KEY))
    going_on.set()
    text = (await again).text
    assert text.endswith("data: [DONE]\n\n")
    assert len(worker.jobs) == 1


async def test_requests_of_one_name_at_once_are_one(pod: RunningPod, worker: ScriptedWorker) -> None:
    answers = await asyncio.gather(*(pod.http.post(CHAT, json=chat(), headers=KEY) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(worker.jobs) == 1


OTHERS: list[dict[str, Any]] = [
    {"temperature": 0.5},
    {"stream": True},
    {"messages": [{"role": "user", "content": ""}]},
]


@pytest.mark.parametrize("other", OTHERS)
async def test_another_request_of_the_same_name_is_refused(
    other: dict[str, Any], pod: RunningPod, worker: ScriptedWorker
) -> None:
    """And the official clients, which repeat a 409, are told not to."""
    await pod.http.post(CHAT, json=chat(), headers=KEY)
    response = await pod.http.post(CHAT, json=chat(**other), headers=KEY)
    message = check_error(response, 409, "idempotency_key_reused", "Idempotency-Key")
    assert "7f1c" in message
    assert response.headers["x-should-retry"] == "false"
    with pytest.raises(APIStatusError):
        await pod.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Another."}], extra_headers=KEY
        )
    at_another_endpoint = await pod.http.post(COMPLETIONS, json=streamed(COMPLETIONS), headers=KEY)
    assert at_another_endpoint.status_code == 409
    assert len(worker.jobs) == 1


async def test_another_order_is_no_other_request(pod: RunningPod, worker: ScriptedWorker) -> None:
    body = chat(temperature=0.5, logit_bias={"1": 1, "2": 2})
    await pod.http.post(CHAT, json=body, headers=KEY)
    turned = dict(reversed({**body, "logit_bias": {"2": 2, "1": 1}}.items()))
    assert (await pod.http.post(CHAT, json=turned, headers=KEY)).status_code == 200
    assert len(worker.jobs) == 1


async def test_names_belong_to_the_key_that_gave_them(redis_url: str, worker: ScriptedWorker) -> None:
    async with serving(settings_for(redis_url, api_key=("one", "two"))) as pod:
        answers = [
            await pod.http.post(CHAT, json=chat(), headers={**KEY, "authorization": f"Bearer {key}"})
            for key in ("one", "two")
        ]
    assert answers[0].json()["id"] != answers[1].json()["id"]


async def test_a_failure_is_an_answer_too(pod: RunningPod, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [fails("Too long.", status=400, code="c")]
    first = await pod.http.post(CHAT, json=chat(), headers=KEY)
    second = await pod.http.post(CHAT, json=chat(), headers=KEY)
    assert (first.status_code, first.content) == (400, second.content)
    assert len(worker.jobs) == 1


async def test_a_name_lasts_as_long_as_its_answer(
    redis_url: str, redis: ArqRedis, worker: ScriptedWorker
) -> None:
    """A stored answer's too; nothing is left when it goes."""
    async with serving(settings_for(redis_url, retention=5, response_ttl=1000)) as pod:
        for body, lasts in ((chat(), 60), (chat(store=True), 1000)):
            await redis.flushdb()
            await worker.announce()
            answer = await pod.http.post(CHAT, json=body, headers=KEY)
            (name,) = await redis.keys("llmboost:once:*")
            stream = keys.stream(answer.json()["id"])
            assert abs(await redis.pttl(name) - await redis.pttl(stream)) < 100
            assert 0 < await redis.ttl(name) <= lasts


async def test_a_request_that_was_not_accepted_takes_no_name(
    redis_url: str, redis: ArqRedis, worker: ScriptedWorker
) -> None:
    """A full queue: the client comes again with the same name, and is served."""
    blocked = asyncio.Event()
    worker.script = lambda job: [blocked.wait(), *says(WORDS), ends()]
    async with serving(settings_for(redis_url, max_queued=1)) as pod:
        full = keys.queue("llama", "interactive")
        await redis.zadd(full, {"somebody": 9e15})
        refused = await pod.http.post(CHAT, json=chat(store=True), headers=KEY)
        check_error(refused, 429, "queue_full")
        assert await redis.keys("llmboost:once:*") == []
        assert await redis.keys("llmboost:stored*") == []
        await redis.delete(full)
        blocked.set()
        assert (await pod.http.post(CHAT, json=chat(store=True), headers=KEY)).status_code == 200


@contextmanager
def replies_lost(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> Iterator[None]:
    """Redis takes what is submitted, and does not say so in time; but of so many jobs."""
    monkeypatch.setattr(generation, "SUBMIT_PATIENCE_S", 0.3)
    submit, count = JobQueue.submit, 0

    async def reply_lost(self: JobQueue, *arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        await submit(self, *arguments, **options)
        if count > after:
            await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(JobQueue, "submit", reply_lost)
        yield


async def test_what_redis_took_and_did_not_say_is_there_for_the_retry(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not taken back: a retry may have joined it by then. What is stored with it is there, too."""
    go = asyncio.Event()
    worker.script = lambda job: [go.wait(), *says(WORDS), ends()]
    body = chat(store=True, metadata={"a": "b"})
    with replies_lost(monkeypatch):
        assert (await pod.http.post(CHAT, json=body, headers=KEY)).status_code == 503
    answer = asyncio.create_task(pod.http.post(CHAT, json=body, headers=KEY))
    await wait_until(lambda: worker.jobs and pod.generations)
    go.set()
    assert (await answer).status_code == 200
    assert len(worker.jobs) == 1
    completion_id = (await answer).json()["id"]
    assert (await pod.openai.chat.completions.retrieve(completion_id)).metadata == {"a": "b"}
    assert [each.id async for each in pod.openai.chat.completions.list()] == [completion_id]


async def test_a_retry_that_fails_takes_nothing_back(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks for jobs again that are there, and does not hear of them: the first reader's answer goes on."""
    go = asyncio.Event()
    worker.script = lambda job: [go.wait(), *says(WORDS), ends()]
    body = {"model": MODEL, "prompt": ["a", "b"]}
    first = asyncio.create_task(pod.http.post(COMPLETIONS, json=body, headers=KEY))
    await wait_until(lambda: len(worker.jobs) == 2)
    with replies_lost(monkeypatch, after=1):
        assert (await pod.http.post(COMPLETIONS, json=body, headers=KEY)).status_code == 503
    go.set()
    assert (await first).status_code == 200
    assert len((await first).json()["choices"]) == 2


UNANSWERED = [NOBODY_READS, REQUEST_LOST, generation.NOT_ACCEPTED]


@pytest.mark.parametrize("why", UNANSWERED, ids=lambda why: str(why.code))
async def test_what_was_never_answered_is_begun_again(
    why: StreamError, pod: RunningPod, worker: ScriptedWorker, queue: JobQueue
) -> None:
    """The client came back too late, or its request was lost with a server: it has its answer now."""
    over = asyncio.Event()
    worker.script = lambda job: [over.wait(), *says(WORDS), ends()]
    first = asyncio.create_task(pod.http.post(CHAT, json=chat(), headers=KEY))
    await wait_until(lambda: worker.jobs)
    await queue.cancel(worker.jobs[0].id, Terminal("test", error=why))
    assert (await first).status_code == why.status
    over.set()
    worker.script = lambda job: [*says(WORDS), ends()]
    answers = await asyncio.gather(*(pod.http.post(CHAT, json=chat(), headers=KEY) for _ in range(5)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert len(worker.jobs) == 2


async def test_an_answer_that_lost_a_part_is_begun_again(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Its end says that it is whole."""
    worker.script = loses
    check_error(await pod.http.post(CHAT, json=chat(), headers=KEY), 500, "stream_gap")
    await wait_until(lambda: worker.finished == 1)
    worker.script = story
    for _ in range(2):
        assert (await pod.http.post(CHAT, json=chat(), headers=KEY)).status_code == 200
    assert len(worker.jobs) == 2


async def test_what_was_deleted_is_not_begun_again(pod: RunningPod, worker: ScriptedWorker) -> None:
    """And the official clients are told that another try won't help."""
    first = await pod.http.post(CHAT, json=chat(store=True), headers=KEY)
    await pod.openai.chat.completions.delete(first.json()["id"])
    response = await pod.http.post(CHAT, json=chat(store=True), headers=KEY)
    check_error(response, 410, "answer_deleted", "Idempotency-Key")
    assert response.headers["x-should-retry"] == "false"
    assert len(worker.jobs) == 1


async def test_an_answer_outlives_what_its_request_named(
    redis_url: str, pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis
) -> None:
    """The response that it follows was deleted, and then the last worker has gone."""
    earlier = await pod.openai.responses.create(model=MODEL, input="x")
    asked: dict[str, Any] = {"input": "y", "previous_response_id": earlier.id, "extra_headers": KEY}
    first = await pod.openai.responses.create(model=MODEL, **asked)
    await pod.openai.responses.delete(earlier.id)
    assert (await pod.openai.responses.create(model=MODEL, **asked)).id == first.id
    async with serving(settings_for(redis_url)) as other:
        await redis.delete(keys.MODELS, *await redis.keys(keys.model_card("*")))
        assert (await other.openai.responses.create(model=MODEL, **asked)).id == first.id
    assert len(worker.jobs) == 2


async def test_a_submission_that_died_half_way_is_completed(
    pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three prompts one was enqueued when the pod died: who asks again gets all three."""
    body = {"model": MODEL, "prompt": ["a", "b", "c"]}
    submit = JobQueue.submit
    count = 0

    async def dying(self: JobQueue, *arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise RuntimeError("the pod has died")
        await submit(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(JobQueue, "submit", dying)
        assert (await pod.http.post(COMPLETIONS, json=body, headers=KEY)).status_code == 500
    answer = await pod.http.post(COMPLETIONS, json=body, headers=KEY)
    assert len(answer.json()["choices"]) == 3
    assert sorted(job.prompt.text or "" for job in worker.jobs) == ["a", "b", "c"]


@pytest.mark.parametrize("key", ["", "x" * 256])
async def test_a_key_must_be_one(key: str, pod: RunningPod) -> None:
    response = await pod.http.post(CHAT, json=chat(), headers={"idempotency-key": key})
    check_error(response, 400, "invalid_value", "Idempotency-Key")


async def test_without_a_name_each_request_is_its_own(pod: RunningPod, worker: ScriptedWorker) -> None:
    first, second = [await pod.http.post(CHAT, json=chat()) for _ in range(2)]
    assert first.json()["id"] != second.json()["id"]
    text = (await pod.http.post(CHAT, json=streamed(CHAT))).text
    assert id_in(text) not in (first.json()["id"], second.json()["id"])
