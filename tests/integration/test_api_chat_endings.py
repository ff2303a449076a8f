"""POST /v1/chat/completions: how answers end before their time, by failures and by clients that leave."""

import asyncio
import logging
import time

import openai
import pytest
from arq.connections import ArqRedis

from llmboost.entries import ChoiceDelta, Delta
from llmboost.streams import SEAL_ID, TokenStreams

from ..waiting import wait_until
from .answers import frames_of
from .api_pod import (
    RunningPod,
    ScriptedWorker,
    chat,
    ends,
    fails,
    says,
    serving,
    settings_for,
)

GRACE_S = 1.0


# Failures


async def test_early_failure_has_its_own_status(pod: RunningPod, worker: ScriptedWorker) -> None:
    """What ends in an error before its first token is a plain HTTP error, also when streamed."""
    worker.script = lambda job: [
        fails("Too long.", type="invalid_request_error", code="c", param="p", status=400)
    ]
    for stream in (True, False):
        response = await pod.http.post("/v1/chat/completions", json=chat(stream=stream))
        assert response.status_code == 400
        assert response.json() == {
            "error": {"message": "Too long.", "type": "invalid_request_error", "param": "p", "code": "c"}
        }
        assert response.headers["x-request-id"] == worker.jobs[-1].id


async def test_a_failed_job_is_not_generated_twice(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Official clients send 5xx again, but not once a job has run."""
    worker.script = lambda job: [fails("It broke.", status=500)]
    for stream in (True, False):
        worker.jobs.clear()
        with pytest.raises(openai.InternalServerError, match=r"It broke\."):
            await pod.openai.chat.completions.create(**chat(stream=stream))
        assert len(worker.jobs) == 1


async def test_late_failure_is_a_frame_and_no_done(pod: RunningPod, worker: ScriptedWorker) -> None:
    """A stream that fails says so, and never ends as if it were complete."""
    worker.script = lambda job: [*says(["Once", " upon"], reason=None), fails("It broke.", code="engine")]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert frames[-1].json == {
        "error": {"message": "It broke.", "type": "server_error", "param": None, "code": "engine"}
    }
    assert frames[-1].id == SEAL_ID
    stream = await pod.openai.chat.completions.create(**chat(stream=True))
    with pytest.raises(openai.APIError, match=r"It broke\."):
        async for _ in stream:
            pass


async def test_a_gap_ends_in_an_error(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Text after a lost token is never shown."""
    worker.script = lambda job: [
        Delta([ChoiceDelta(0, 0, [1], "a")]),
        Delta([ChoiceDelta(0, 2, [3], "c")]),
        ends(2),
    ]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert [frame.json["choices"][0]["delta"]["content"] for frame in frames[:-1]] == ["a"]
    assert frames[-1].json["error"]["code"] == "stream_gap"
    response = await pod.http.post("/v1/chat/completions", json=chat())
    assert (response.status_code, response.headers["x-should-retry"]) == (500, "false")


async def test_a_lost_stream_ends_in_an_error(
    pod: RunningPod, worker: ScriptedWorker, redis: ArqRedis
) -> None:
    """Redis was flushed: the reader is told, and does not wait for ever."""
    gone = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), gone.wait()]
    async with pod.begun("/v1/chat/completions", chat(stream=True)) as stream:
        await redis.flushall()
        text = await stream.finish()
    gone.set()
    assert frames_of(text)[-1].json["error"]["code"] == "stream_gone"


async def test_waiting_clients_get_headers(redis_url: str, worker: ScriptedWorker) -> None:
    """After `headers_after` in the queue the response begins; a failure is then a frame."""
    seen = asyncio.Event()
    worker.script = lambda job: [seen.wait(), fails("It broke.", status=400)]
    async with (
        serving(settings_for(redis_url, headers_after=0.05)) as pod,
        pod.http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as response,
    ):
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["cache-control"] == "no-store"
        seen.set()
        (frame,) = frames_of((await response.aread()).decode())
    assert frame.json["error"]["message"] == "It broke."


# Clients that leave


async def test_a_stream_is_left_and_not_sealed(pod: RunningPod, worker: ScriptedWorker) -> None:
    """A client that goes takes its subscription along; whether to go on is not for the pod to say."""
    left = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), left.wait(), ends(1)]
    async with pod.begun("/v1/chat/completions", chat(stream=True)):
        assert len(pod.generations) == 1
    await wait_until(lambda: not pod.generations)
    left.set()
    await wait_until(lambda: worker.finished == 1)
    assert not worker.stopped


@pytest.mark.parametrize("stream", [True, False])
async def test_waiting_for_the_first_token_ends_with_the_client(
    pod: RunningPod, worker: ScriptedWorker, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The same before anything was sent; and that is no error of the server's."""
    left = asyncio.Event()
    worker.script = lambda job: [left.wait(), *says(["Once"]), ends(1)]
    asking = asyncio.create_task(pod.http.post("/v1/chat/completions", json=chat(stream=stream)))
    await wait_until(lambda: worker.jobs)
    asking.cancel()
    await wait_until(lambda: not pod.generations)
    left.set()
    await wait_until(lambda: worker.finished == 1)
    assert not worker.stopped
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_the_audience_lapses_with_the_last_reader(
    redis_url: str, worker: ScriptedWorker, streams: TokenStreams
) -> None:
    """While a client reads the stream has an audience; once it has left, none is promised after the grace."""
    left = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), left.wait(), ends(1)]
    async with serving(settings_for(redis_url, grace=GRACE_S)) as pod:
        async with pod.begun("/v1/chat/completions", chat(stream=True)):
            job_id = worker.jobs[0].id
            until = time.monotonic() + 2 * GRACE_S
            while time.monotonic() < until:
                assert (await streams.audience([job_id]))[0] > 0

        async def lapsed() -> bool:
            return (await streams.audience([job_id]))[0] < 0

        await wait_until(lapsed)
        left.set()
        await wait_until(lambda: worker.finished == 1)
