"""Whatever is wrong with a request, the answer is OpenAI-shaped, says what to do, and harms nothing."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from llmboost.embedded import free_port
from llmboost.jobs import new_id
from llmboost_api import generation, patience
from llmboost_api.auth import fingerprint
from llmboost_api.routes import models

from ..waiting import wait_until
from .answers import check_error
from .api_pod import MODEL, RunningPod, ScriptedWorker, chat, serving, settings_for


async def test_bodies_that_are_no_request(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Each is a 400 that says where; afterwards the server answers as before."""
    bodies: list[tuple[bytes, str]] = [
        (b"", "empty"),
        (b"   ", "empty"),
        (b'{"model": ', "line 1, column 11"),
        (b'{"model": "a",\n "n": 1,}', "line 2, column"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b'{"temperature": NaN}', "NaN is not a JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"temperature": 1e999}', "out of range"),
        (b'{"n": ' + b"9" * 5000 + b"}", "out of range"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (json.dumps(chat(user="\ud800")).encode(), "lone surrogate \\ud800"),
        (json.dumps({"\udfff": 1}).encode(), "lone surrogate \\udfff"),
        (b'{"model": "\xed\xa0\x80"}', "byte 11 is not UTF-8"),
        (b'{"model": "\xff"}', "byte 11 is not UTF-8"),
        (json.dumps(chat()).encode("utf-16"), "not UTF-8"),
    ]
    for body, says in bodies:
        for path in ("/v1/chat/completions", "/v1/completions"):
            message = check_error(await pod.http.post(path, content=body), 400, "invalid_json")
            assert says in message, (body[:40], message)
    response = await pod.http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 200
    assert len(worker.jobs) == 1


async def test_any_content_type_will_do(pod: RunningPod, worker: ScriptedWorker) -> None:
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "nonsense", ""):
        headers = {"content-type": content_type}
        content = json.dumps(chat())
        response = await pod.http.post("/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == 200, content_type
    headers = {"content-encoding": "gzip"}
    check_error(await pod.http.post("/v1/chat/completions", content=b"\x1f\x8b", headers=headers), 415)


async def test_bodies_that_are_too_large(redis_url: str, worker: ScriptedWorker) -> None:
    """413 before the body is in memory, whether or not it says how long it will be."""
    async with serving(settings_for(redis_url, max_request_bytes=10_000)) as pod:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            for _ in range(1000):
                sent += 10_000
                yield b" " * 10_000

        large = json.dumps(chat(user="x" * 10_000)).encode()
        message = check_error(
            await pod.http.post("/v1/chat/completions", content=large), 413, "request_too_large"
        )
        assert "10000 bytes" in message
        check_error(await pod.http.post("/v1/chat/completions", content=endless()), 413, "request_too_large")
        exact = json.dumps(chat(user="")).encode()
        exact = json.dumps(chat(user="x" * (10_000 - len(exact)))).encode()
        assert len(exact) == 10_000
        assert (await pod.http.post("/v1/chat/completions", content=exact)).status_code == 200


async def test_a_client_that_leaves_while_it_sends(
    pod: RunningPod, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a body and a closed connection: no job, no error in the log."""
    with caplog.at_level(logging.DEBUG, "llmboost_api"):
        _, writer = await asyncio.open_connection("127.0.0.1", pod.server.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{")
        await writer.drain()
        await wait_until(lambda: pod.server.server_state.tasks)
        writer.close()
        await wait_until(lambda: "client left" in caplog.text)
    assert not worker.jobs
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_unknown_places(pod: RunningPod) -> None:
    check_error(await pod.http.get("/v2/nothing"), 404, "unknown_url")
    check_error(await pod.http.get("/v1/chat/completions/"), 404, "unknown_url")
    response = await pod.http.get("/v1/completions")
    assert "use POST" in check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    response = await pod.http.put(f"/v1/chat/completions/{new_id('chatcmpl-')}")
    assert "use DELETE, GET or POST." in check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET, POST"


async def test_unknown_model(pod: RunningPod, worker: ScriptedWorker) -> None:
    response = await pod.http.post("/v1/chat/completions", json=chat(model="gpt-9"))
    message = check_error(response, 404, "model_not_found", "model")
    assert "'gpt-9'" in message
    assert repr(MODEL) in message
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        await pod.openai.chat.completions.create(**chat(model="gpt-9"))


async def test_keys(redis_url: str, worker: ScriptedWorker) -> None:
    """With keys, /v1 asks for one; a job knows the fingerprint of its own, and no key."""
    async with serving(settings_for(redis_url, api_key=("first-key", "schlüssel"))) as pod:
        for path in ("/v1/models", f"/v1/models/{MODEL}"):
            check_error(await pod.http.get(path), 401, "missing_api_key")
        response = await pod.http.post("/v1/chat/completions", content=b"not even JSON")
        check_error(response, 401, "missing_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
        for wrong in ("-", "first", "first-key2", "\xff"):
            headers = {"authorization": f"Bearer {wrong}".encode("latin-1")}
            response = await pod.http.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert "first" not in response.text
        with pytest.raises(openai.AuthenticationError):
            await pod.openai.models.list()
        for key in ("first-key", "schlüssel"):
            headers = {"authorization": f"bearer {key}".encode()}
            response = await pod.http.post("/v1/chat/completions", json=chat(), headers=headers)
            assert response.status_code == 200
            assert worker.jobs[-1].owner == fingerprint(key)
        assert (await pod.http.get("/health")).status_code == 200
    assert len({job.owner for job in worker.jobs}) == 2


async def test_redis_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod starts, says 503 with a time to come back, and hangs nowhere."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    async with serving(settings_for(f"redis://127.0.0.1:{free_port()}/0")) as pod:
        assert (await pod.http.get("/health")).status_code == 200
        ready = await pod.http.get("/ready")
        assert ready.status_code == 503
        assert "Redis" in ready.json()["reason"]
        for request in (
            pod.http.post("/v1/chat/completions", json=chat()),
            pod.http.post("/v1/chat/completions", json=chat(stream=True)),
            pod.http.get("/v1/models"),
            pod.http.get("/v1/models/a"),
        ):
            response = await request
            check_error(response, 503, "service_unavailable")
            assert response.headers["retry-after"]


async def test_redis_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts connections and stays silent is waited for no longer than one that is away."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    monkeypatch.setattr("llmboost_api.routes.health.READY_TIMEOUT_S", 0.2)
    silent = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    async with serving(settings_for(f"redis://127.0.0.1:{port}/0")) as pod:
        check_error(await pod.http.post("/v1/chat/completions", json=chat()), 503, "service_unavailable")
        assert (await pod.http.get("/ready")).status_code == 503
    silent.close()


async def test_redis_lost_while_submitting(
    pod: RunningPod, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown outcome is asked about again: the job runs once. If that lasts, it is withdrawn: 503."""
    monkeypatch.setattr(generation, "SUBMIT_PATIENCE_S", 0.3)
    queue = pod.server.config.app.state.pod.queue  # type: ignore[union-attr]
    submit, failures = queue.submit, 1

    async def loses_replies(*args: Any, **kwargs: Any) -> None:
        nonlocal failures
        await submit(*args, **kwargs)
        if failures:
            failures -= 1
            raise ConnectionResetError

    monkeypatch.setattr(queue, "submit", loses_replies)
    response = await pod.http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 200
    assert len(worker.jobs) == 1
    failures = 1000
    held = asyncio.Event()
    worker.script = lambda job: [held.wait()]
    response = await pod.http.post("/v1/chat/completions", json=chat())
    check_error(response, 503, "service_unavailable")
    held.set()


async def test_errors_that_nobody_foresaw(
    pod: RunningPod, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A 500 with the request's id, nothing of the cause, one line in the log; clients don't send it again."""
    calls = 0

    def breaks(card: object) -> None:
        nonlocal calls
        calls += 1
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(models, "model_object", breaks)
    with caplog.at_level(logging.INFO):
        response = await pod.http.get("/v1/models")
    message = check_error(response, 500, "internal_error")
    assert response.headers["x-request-id"] in message
    assert "secret" not in response.text
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == 1
    assert response.headers["x-request-id"] in logged[0].getMessage()
    calls = 0
    with pytest.raises(openai.InternalServerError):
        await pod.openai.models.list()
    assert calls == 1
