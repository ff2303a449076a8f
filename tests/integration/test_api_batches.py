"""Batches, seen by the official client: made from a file, run line by line, and written into files."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from arq.connections import ArqRedis
from openai import AsyncOpenAI, BadRequestError, ConflictError, NotFoundError

from llmboost import keys
from llmboost.jobs import GenerationJob
from llmboost_api.protocol.form import ENDPOINTS, Endpoint
from tests.waiting import wait_until

from .answers import check_error
from .api_pod import (
    COMPLETIONS,
    MODEL,
    WORDS,
    RunningPod,
    Script,
    ScriptedWorker,
    Step,
    chat,
    fails,
    serving,
    settings_for,
    story,
)
from .batch_inputs import begin, ended, line, lines, outcome, upload

PATH = "/v1/batches"


def held_by(gate: asyncio.Event) -> Script:
    """Answers for requests of two tokens wait for the gate."""

    def script(job: GenerationJob) -> Iterator[Step]:
        if job.sampling.max_tokens == 2:
            yield gate.wait()
        yield from story(job)

    return script


async def test_every_line_is_answered(pod: RunningPod) -> None:
    """Each line has one row in the output file, with the answer that the endpoint gives."""
    batch = await begin(pod.openai, lines(20), metadata={"what": "test"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", "/v1/chat/completions")
    assert batch.expires_at is not None
    assert batch.expires_at - batch.created_at == 24 * 3600
    found = await outcome(pod.openai, batch.id)
    assert found.batch.status == "completed"
    assert found.counts == (20, 20, 0)
    assert found.output.keys() == {f"line-{number}" for number in range(1, 21)}
    assert found.batch.error_file_id is None
    assert found.batch.metadata == {"what": "test"}
    assert found.batch.model == MODEL
    assert found.batch.usage is not None
    assert found.batch.usage.total_tokens == 20 * 10
    row = found.output["line-7"]
    assert list(row) == ["id", "custom_id", "response", "error"]
    assert row["id"].startswith("batch_req_")
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert body["object"] == "chat.completion"
    assert body["id"] == row["response"]["request_id"]
    assert found.text("line-7") == "Once upon a time."
    times = found.batch
    assert None not in (times.in_progress_at, times.finalizing_at, times.completed_at)
    assert times.failed_at is times.cancelled_at is times.expired_at is None


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": chat(),
    "/v1/completions": {"model": MODEL, "prompt": "Say"},
    "/v1/responses": {"model": MODEL, "input": "Tell me a story."},
}


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda endpoint: endpoint.name)
async def test_every_endpoint(pod: RunningPod, endpoint: Endpoint) -> None:
    """A batch may ask for whatever is generated; its rows hold what the endpoint would have answered."""
    path = endpoint.path
    batch = await begin(pod.openai, [line("a", BODIES[path], url=path)], endpoint=path)
    found = await outcome(pod.openai, batch.id)
    assert found.counts == (1, 1, 0)
    body = found.output["a"]["response"]["body"]
    alone = (await pod.http.post(path, json=BODIES[path])).json()
    assert body.keys() == alone.keys()
    assert (body["object"], body["usage"]) == (alone["object"], alone["usage"])
    assert body["id"].startswith(endpoint.prefix)
    assert "Once upon a time." in json.dumps(body)


async def test_what_is_kept_of_lines(pod: RunningPod, redis: ArqRedis) -> None:
    """Nothing but the batch and its files, even if a line asks for its answer to be stored."""
    batch = await begin(pod.openai, [line("a", chat(store=True))])
    found = await outcome(pod.openai, batch.id)
    assert found.counts == (1, 1, 0)
    assert [key async for key in redis.scan_iter(match=keys.stream("*"))] == []
    assert [key async for key in redis.scan_iter(match=keys.stored("*"))] == []


async def test_lines_are_batch_jobs(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Their jobs give way to interactive ones, need nobody who reads, and have the batch's time."""
    batch = await begin(pod.openai, lines(3), window="2h")
    assert (await outcome(pod.openai, batch.id)).counts == (3, 3, 0)
    assert batch.expires_at is not None
    for job in worker.jobs:
        assert (job.job_class, job.needs_audience) == ("batch", False)
        assert int(job.deadline) == batch.expires_at
    assert len({job.sampling.seed for job in worker.jobs}) == 3


async def test_its_files(pod: RunningPod) -> None:
    """They are files like any other, of a purpose of their own, and go when they were to go."""
    batch = await begin(
        pod.openai,
        [line("good"), line("bad", chat(temperature=3))],
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    found = await outcome(pod.openai, batch.id)
    for file_id, kind in ((found.batch.output_file_id, "output"), (found.batch.error_file_id, "error")):
        assert file_id is not None
        file = await pod.openai.files.retrieve(file_id)
        assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_{kind}.jsonl")
        assert file.expires_at == file.created_at + 7200


async def test_completions_with_several_prompts(pod: RunningPod) -> None:
    """A line may take several jobs."""
    body = {"model": MODEL, "prompt": ["one", "two", "three"], "n": 2}
    batch = await begin(pod.openai, [line("prompts", body, url=COMPLETIONS)], endpoint=COMPLETIONS)
    found = await outcome(pod.openai, batch.id)
    choices = found.output["prompts"]["response"]["body"]["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert {choice["text"] for choice in choices} == {"".join(WORDS)}


async def test_more_lines_than_may_wait(redis_url: str, worker: ScriptedWorker) -> None:
    """The limit of waiting requests is for those who could come again later."""
    async with serving(settings_for(redis_url, max_queued=1)) as pod:
        batch = await begin(pod.openai, lines(40))
        assert (await outcome(pod.openai, batch.id)).counts == (40, 40, 0)


# Lines that fail by themselves


async def test_a_line_that_the_endpoint_refuses(pod: RunningPod) -> None:
    """Its row in the error file says why, and in which line; the others are run."""
    bad = [line("hot", chat(temperature=9)), line("none", {"messages": []})]
    batch = await begin(pod.openai, [line("good"), *bad])
    found = await outcome(pod.openai, batch.id)
    assert found.batch.status == "completed"
    assert found.counts == (3, 1, 2)
    assert found.output.keys() == {"good"}
    row = found.errors["hot"]
    assert row["error"] is None
    assert row["response"]["status_code"] == 400
    error = row["response"]["body"]["error"]
    assert error["message"].startswith("Line 2: 'temperature' is 9")
    assert (error["type"], error["param"]) == ("invalid_request_error", "temperature")
    assert found.errors["none"]["response"]["body"]["error"]["param"] == "model"


async def test_a_line_that_fails(pod: RunningPod, worker: ScriptedWorker) -> None:
    """A generation that ends in an error has its status and its error object in the error file."""

    def script(job: GenerationJob) -> Iterator[Step]:
        yield fails("It took three workers down.", code="tries_used_up", status=500)

    worker.script = script
    batch = await begin(pod.openai, lines(2))
    found = await outcome(pod.openai, batch.id)
    assert found.batch.output_file_id is None
    assert found.counts == (2, 0, 2)
    response = found.errors["line-2"]["response"]
    assert response["status_code"] == 500
    assert response["body"]["error"]["message"] == "It took three workers down."
    assert response["request_id"].startswith("chatcmpl-")


# Making


async def test_what_cannot_be_a_batch(pod: RunningPod) -> None:
    """Each wrong field is named, with its value and what would be right."""
    file_id = await upload(pod.openai, lines(1))
    other = await upload(pod.openai, lines(1), purpose="user_data")
    good: dict[str, Any] = {
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
    }
    for change, param in (
        ({"input_file_id": "file-nowhere"}, "input_file_id"),
        ({"input_file_id": other}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0s"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"completion_window": 24}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"extra_body": {"colour": "red"}}, "colour"),
    ):
        with pytest.raises(BadRequestError) as refused:
            await pod.openai.batches.create(**{**good, **change})  # type: ignore[arg-type]
        assert refused.value.param == param, change
    assert (await pod.openai.batches.list()).data == []


@pytest.mark.parametrize(("window", "seconds"), [("90s", 90), ("5m", 300), ("48h", 172800), ("30d", 2592000)])
async def test_windows(pod: RunningPod, window: str, seconds: int) -> None:
    """Besides OpenAI's 24h, any other time up to 30 days."""
    batch = await begin(pod.openai, lines(1), window=window)
    assert batch.expires_at == batch.created_at + seconds
    assert batch.completion_window == window
    await ended(pod.openai, batch.id)


async def test_the_same_request_again(pod: RunningPod, worker: ScriptedWorker) -> None:
    """With an idempotency key a batch is made once, even when its input is gone by then; another request of
    that name is refused."""
    file_id = await upload(pod.openai, lines(2))
    fields: dict[str, Any] = {
        "input_file_id": file_id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "extra_headers": {"Idempotency-Key": "once"},
    }
    made = await asyncio.gather(*(pod.openai.batches.create(**fields) for _ in range(4)))
    assert len({batch.id for batch in made}) == 1
    await ended(pod.openai, made[0].id)
    await pod.openai.files.delete(file_id)
    again = await pod.openai.batches.create(**fields)
    assert (again.id, again.status) == (made[0].id, "completed")
    with pytest.raises(ConflictError):
        await pod.openai.batches.create(**{**fields, "completion_window": "1h"})
    assert len(worker.jobs) == 2


# Looking


async def test_list(pod: RunningPod) -> None:
    """Newest first, page by page."""
    file_id = await upload(pod.openai, lines(1))
    made = [
        await pod.openai.batches.create(
            input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        for _ in range(5)
    ]
    expected = [batch.id for batch in reversed(made)]
    page = await pod.openai.batches.list(limit=2)
    assert [batch.id for batch in page.data] == expected[:2]
    assert page.has_more
    assert [batch.id async for batch in pod.openai.batches.list(limit=2)] == expected
    assert [batch.id async for batch in pod.openai.batches.list()] == expected
    rest = await pod.openai.batches.list(after=expected[3])
    assert [batch.id for batch in rest.data] == expected[4:]
    for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("after=x", "after"), ("a=1", "a")):
        code = "unknown_parameter" if param == "a" else "invalid_value"
        check_error(await pod.http.get(f"{PATH}?{query}"), 400, code, param)
    for batch in made:
        await ended(pod.openai, batch.id)


async def test_other_keys_see_nothing(redis_url: str, worker: ScriptedWorker) -> None:
    """A batch belongs to the API key that made it, as its files do."""
    async with serving(settings_for(redis_url, api_key="one,two")) as pod:
        one, two = (
            AsyncOpenAI(base_url=f"{pod.url}/v1", api_key=key, max_retries=0) for key in ("one", "two")
        )
        batch = await begin(one, lines(1))
        for call in (two.batches.retrieve(batch.id), two.batches.cancel(batch.id)):
            with pytest.raises(NotFoundError):
                await call
        with pytest.raises(BadRequestError):
            await two.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
            )
        assert (await two.batches.list()).data == []
        found = await outcome(one, batch.id)
        assert found.batch.output_file_id is not None
        with pytest.raises(NotFoundError):
            await two.files.content(found.batch.output_file_id)
        await one.close()
        await two.close()


async def test_unknown_batches(pod: RunningPod) -> None:
    """A 404 says so."""
    for batch_id in ("batch_nowhere", "batch_6b07383044d3135ff038a8ee244c47a3", "x"):
        told = check_error(await pod.http.get(f"{PATH}/{batch_id}"), 404, "batch_not_found", "batch_id")
        assert "2592000 s" in told
        check_error(await pod.http.post(f"{PATH}/{batch_id}/cancel"), 404, "batch_not_found", "batch_id")


async def test_counts_are_live(pod: RunningPod, worker: ScriptedWorker) -> None:
    """How many lines are done can be seen while others still run."""
    gate = asyncio.Event()
    worker.script = held_by(gate)
    batch = await begin(pod.openai, lines(6, lambda number: chat(max_tokens=1 + number % 2)))

    async def half_done() -> bool:
        counts = (await pod.openai.batches.retrieve(batch.id)).request_counts
        return counts is not None and (counts.total, counts.completed) == (6, 3)

    await wait_until(half_done)
    assert (await pod.openai.batches.retrieve(batch.id)).status == "in_progress"
    gate.set()
    assert (await outcome(pod.openai, batch.id)).counts == (6, 6, 0)


async def test_a_batch_is_forgotten_after_its_time(
    redis_url: str, redis: ArqRedis, worker: ScriptedWorker
) -> None:
    """Its record expires `--response-ttl` after its end, and no page of the list holds it then."""
    async with serving(settings_for(redis_url, response_ttl=0.2)) as pod:
        batch = await begin(pod.openai, lines(1))

        async def gone() -> bool:
            return (await pod.http.get(f"{PATH}/{batch.id}")).status_code == 404

        await wait_until(gone)
        assert (await pod.openai.batches.list()).data == []
    assert not await redis.exists(keys.BATCHES, keys.batch(batch.id))


# Pods


async def test_a_pod_that_is_told_to_go(redis_url: str, worker: ScriptedWorker) -> None:
    """It commits what it has and hands its batch over: another pod goes on at once, nothing is run again."""
    gate = asyncio.Event()
    worker.script = held_by(gate)
    async with serving(settings_for(redis_url)) as one:
        batch = await begin(one.openai, lines(20, lambda number: chat(max_tokens=1 + number % 2)))
        await wait_until(lambda: len(worker.jobs) == 20 and worker.finished == 10)
    async with serving(settings_for(redis_url)) as two:

        async def taken_over() -> bool:
            counts = (await two.openai.batches.retrieve(batch.id)).request_counts
            return counts is not None and counts.completed == 10

        await wait_until(taken_over, within=2)
        gate.set()
        found = await outcome(two.openai, batch.id, within=3)
    assert found.counts == (20, 20, 0)
    assert len(worker.jobs) == 20


async def test_a_pod_that_runs_no_batches(redis_url: str, worker: ScriptedWorker) -> None:
    """With `--no-batch-runner` a pod takes batches in, for others to run."""
    async with serving(settings_for(redis_url, batch_runner=False)) as one:
        batch = await begin(one.openai, lines(2))
        async with serving(settings_for(redis_url)) as two:
            assert (await outcome(one.openai, batch.id)).counts == (2, 2, 0)
            assert two.url != one.url


async def test_several_batches(pod: RunningPod, worker: ScriptedWorker) -> None:
    """A small batch need not wait for the end of a large one that was there before."""
    gate = asyncio.Event()
    worker.script = held_by(gate)
    large = await begin(pod.openai, lines(200, lambda number: chat(max_tokens=2)))
    await wait_until(lambda: len(worker.jobs) > 10)
    small = await begin(pod.openai, lines(5))
    assert (await outcome(pod.openai, small.id)).counts == (5, 5, 0)
    assert (await pod.openai.batches.retrieve(large.id)).status == "in_progress"
    await pod.openai.batches.cancel(large.id)
    gate.set()
    await ended(pod.openai, large.id)


async def test_a_stream_that_is_lost(pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis) -> None:
    """A line whose stream is gone, with a server that had written it last, is begun again."""
    gate = asyncio.Event()
    worker.script = lambda job: [gate.wait(), *story(job)]
    batch = await begin(pod.openai, lines(3))
    await wait_until(lambda: len(worker.jobs) == 3)
    await redis.delete(keys.stream(worker.jobs[1].id))
    gate.set()
    assert (await outcome(pod.openai, batch.id)).counts == (3, 3, 0)
    assert len(worker.jobs) == 4
