"""Pages of other origins: what the answers tell a browser."""

import pytest

from llmboost_api.routes import models

from .api_pod import ScriptedWorker, chat, serving, settings_for

PAGE = {"origin": "https://chat.example.com"}
ASKED = "authorization,content-type,last-event-id,x-stainless-os,x-stainless-retry-count"
QUESTION = {
    **PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": ASKED,
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/nowhere"])
async def test_a_browser_asks_without_the_key(redis_url: str, path: str) -> None:
    """Its question is answered wherever a key is needed; every header that a client sends is allowed."""
    async with serving(settings_for(redis_url, api_key="secret")) as pod:
        answer = await pod.http.options(path, headers=QUESTION)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == ASKED


async def test_every_answer_may_be_read(
    redis_url: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error as well, an unforeseen one included: or a page would see a failed connection and no reason."""
    key = {"authorization": "Bearer secret"}
    async with serving(settings_for(redis_url, api_key="secret")) as pod:
        answers = [
            await pod.http.post("/v1/chat/completions", json=body, headers={**PAGE, **key})
            for body in (chat(), chat(stream=True), chat(model="unknown"), {})
        ]
        answers.append(await pod.http.get("/v1/models", headers=PAGE))
        answers.append(await pod.http.get("/nowhere", headers=PAGE))
        monkeypatch.setattr(models, "model_object", None)
        answers.append(await pod.http.get("/v1/models", headers={**PAGE, **key}))
    assert [answer.status_code for answer in answers] == [200, 200, 404, 400, 401, 404, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "*"
        readable = answer.headers["access-control-expose-headers"].split(", ")
        assert {"x-request-id", "x-should-retry", "retry-after"} <= {*readable}
        assert "access-control-allow-credentials" not in answer.headers


async def test_origins_can_be_restricted(redis_url: str, worker: ScriptedWorker) -> None:
    """The one that is allowed is named, for caches too; another gets no leave to read."""
    async with serving(
        settings_for(redis_url, allowed_origins=f"{PAGE['origin']},http://localhost:3000")
    ) as pod:
        answer = await pod.http.get("/v1/models", headers=PAGE)
        question = await pod.http.options("/v1/models", headers=QUESTION)
        other = await pod.http.get("/v1/models", headers={"origin": "https://elsewhere.example"})
        refused = await pod.http.options(
            "/v1/models", headers={**QUESTION, "origin": "https://elsewhere.example"}
        )
    for allowed in (answer, question):
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == PAGE["origin"]
        assert "Origin" in allowed.headers["vary"]
    assert refused.status_code == 400
    for without in (other, refused):
        assert "access-control-allow-origin" not in without.headers


async def test_no_other_origin(redis_url: str, worker: ScriptedWorker) -> None:
    async with serving(settings_for(redis_url, allowed_origins="")) as pod:
        answer = await pod.http.get("/v1/models", headers=PAGE)
        question = await pod.http.options("/v1/models", headers=QUESTION)
    assert (answer.status_code, question.status_code) == (200, 405)
    for each in (answer, question):
        assert not [name for name in each.headers if name.startswith("access-control")]
