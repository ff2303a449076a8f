"""Whatever a client sends, the answer is a success or an error of its own, never one of the server's."""

import json
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from llmboost_api.app import create_app
from llmboost_api.protocol.chat import ChatRequest
from llmboost_api.protocol.completions import CompletionRequest
from llmboost_api.protocol.responses.request import ResponseRequest

from .api_pod import MODEL, chat, settings_for, working

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
CHAT_FIELDS = sorted({*ChatRequest.model_fields, *ChatRequest.unsupported, "nonsense"})
RESPONSE_FIELDS = sorted({*ResponseRequest.model_fields, *ResponseRequest.unsupported, "nonsense"})
COMPLETION_FIELDS = sorted({*CompletionRequest.model_fields, *CompletionRequest.unsupported, "nonsense"})

# json.dumps writes lone surrogates and NaN as they come: both may be sent, neither may be accepted.
texts = st.text(st.characters(codec=None), max_size=20)
numbers = st.integers(-(2**70), 2**70) | st.integers(-2, 20) | st.floats()
scalars = st.none() | st.booleans() | numbers | texts | st.sampled_from(["user", "text", MODEL, "42"])
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts | st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def fields_of(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), anything, max_size=3)


@pytest.fixture
def client(redis_url: str) -> Iterator[TestClient]:
    with TestClient(create_app(settings_for(redis_url))) as client:
        assert client.portal is not None

        async def work() -> None:
            redis = connect(redis_url)
            await redis.flushall()
            async with working(redis, TokenStreams(redis, 60)):
                await done.wait()
            await redis.flushall()
            await redis.aclose()

        done = client.portal.call(anyio.Event)
        worker = client.portal.start_task_soon(work)
        while client.get("/ready").status_code != 200:
            pass
        yield client
        client.portal.call(done.set)
        worker.result()


def check(response: httpx.Response) -> int:
    assert response.status_code < 500, response.text
    assert response.headers["x-request-id"]
    if response.status_code >= 400:
        error = response.json()["error"]
        assert list(error) == ["message", "type", "param", "code"]
        assert error["message"]
        assert len(error["message"]) < 1000
    elif response.headers["content-type"].startswith("text/event-stream"):
        last = response.text[:-2].rpartition("\n\n")[2]
        assert last.endswith("data: [DONE]") or "\nevent: response.completed\n" in last
    else:
        answer = response.json()
        assert answer.get("choices") or answer["status"] in ("completed", "queued")
    return response.status_code


# The pod's thread draws its jitter while a strategy draws its values.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_any_body_is_answered(client: TestClient) -> None:
    seen: set[int] = set()

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(
        anything,
        fields_of(CHAT_FIELDS),
        fields_of(COMPLETION_FIELDS),
        fields_of(RESPONSE_FIELDS),
        st.binary(max_size=30),
    )
    def fuzz(body: Any, chat_fields: Any, completion_fields: Any, response_fields: Any, raw: bytes) -> None:
        for path in PATHS:
            seen.add(check(client.post(path, content=json.dumps(body))))
            seen.add(check(client.post(path, content=raw)))
        seen.add(check(client.post(PATHS[0], content=json.dumps(chat(**chat_fields)))))
        message = {"role": "user", "content": body}
        seen.add(check(client.post(PATHS[0], content=json.dumps(chat(messages=[message, body])))))
        completion = {"model": MODEL, "prompt": "Hi", **completion_fields}
        seen.add(check(client.post(PATHS[1], content=json.dumps(completion))))
        seen.add(check(client.post(PATHS[1], content=json.dumps({"model": MODEL, "prompt": body}))))
        response = {"model": MODEL, "input": "Hi", **response_fields}
        seen.add(check(client.post(PATHS[2], content=json.dumps(response))))
        seen.add(check(client.post(PATHS[2], content=json.dumps({"model": MODEL, "input": body}))))
        item = {"role": "user", "content": body}
        seen.add(check(client.post(PATHS[2], content=json.dumps({"model": MODEL, "input": [item, body]}))))

    fuzz()
    assert {200, 400} <= seen
