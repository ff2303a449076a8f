"""Work that outlives its request, with OpenAI's own client: every call goes to another pod than the last."""

import io
import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.commands import wait_until
from tests.e2e import system as systems
from tests.e2e.system import MODEL, System
from tests.turns import Turns

STORY: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tell me a story about a cat."}],
    "temperature": 0,
    "max_tokens": 40,
}
ENDLESS = {"max_tokens": 1500, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def two_pods() -> Iterator[System]:
    with systems.scaled(2, 1) as running:
        yield running


@pytest.fixture
def turns(two_pods: System) -> Turns[OpenAI]:
    return Turns(*(two_pods.openai(pod) for pod in range(2)))


def test_chat_completions(turns: Turns[OpenAI]) -> None:
    made = turns.next.chat.completions.create(**STORY, store=True, metadata={"kind": "story"})
    assert turns.next.chat.completions.retrieve(made.id).choices == made.choices
    assert [each.id for each in turns.next.chat.completions.list(metadata={"kind": "story"})] == [made.id]
    messages = turns.next.chat.completions.messages.list(made.id)
    assert [message.content for message in messages] == ["Tell me a story about a cat."]
    changed = turns.next.chat.completions.update(made.id, metadata={"kind": "tale"})
    assert changed.metadata == {"kind": "tale"}
    assert turns.next.chat.completions.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        turns.next.chat.completions.retrieve(made.id)


def test_cancelling_a_chat_completion(two_pods: System, turns: Turns[OpenAI]) -> None:
    """Its reader's stream ends, and its slot is free at once."""
    stream = turns.next.chat.completions.create(**{**STORY, **ENDLESS}, stream=True)
    first = next(iter(stream))
    answer: Any = turns.next.post(f"/chat/completions/{first.id}/cancel", cast_to=object)
    assert answer["cancelled"]
    with pytest.raises(openai.APIError, match="cancelled"):
        for _ in stream:
            pass
    two_pods.await_idle()


def test_a_request_that_is_sent_again(turns: Turns[OpenAI]) -> None:
    key = {"Idempotency-Key": str(uuid.uuid4())}
    body = {**STORY, "temperature": 1}
    answers = [turns.next.chat.completions.create(**body, extra_headers=key) for _ in range(2)]
    assert answers[0] == answers[1]
    with pytest.raises(openai.ConflictError):
        turns.next.chat.completions.create(**{**body, "temperature": 0.5}, extra_headers=key)


def test_responses(turns: Turns[OpenAI]) -> None:
    asked: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_output_tokens": 400}
    made = turns.next.responses.create(**asked, input="Tell me a story about a cat.")
    assert made.output_text
    assert turns.next.responses.retrieve(made.id) == made
    items = turns.next.responses.input_items.list(made.id)
    assert [item.content[0].text for item in items] == ["Tell me a story about a cat."]  # type: ignore[union-attr]
    events = list(turns.next.responses.create(**asked, input="Tell me a story about a cat.", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == made.output_text
    again = turns.next.responses.retrieve(events[-1].response.id, stream=True, starting_after=3)
    assert list(again) == events[4:]
    further = turns.next.responses.create(**asked, input="And then?", previous_response_id=made.id)
    assert further.usage is not None
    assert made.usage is not None
    assert further.usage.input_tokens > made.usage.total_tokens
    turns.next.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        turns.next.responses.retrieve(made.id)


def test_responses_in_the_background(two_pods: System, turns: Turns[OpenAI]) -> None:
    asked: dict[str, Any] = {"model": MODEL, "input": "Tell me a story.", "background": True}
    made = turns.next.responses.create(**asked, max_output_tokens=400, temperature=0)
    assert made.status == "queued"
    done = wait_until(
        lambda: (now := turns.next.responses.retrieve(made.id)).status == "completed" and now,
        within=30,
        what="it",
    )
    assert done.output_text
    endless = turns.next.responses.create(
        **asked, max_output_tokens=1500, extra_body={"ignore_eos": True}, stream=True
    )
    first = next(iter(endless))
    cancelled = turns.next.responses.cancel(first.response.id)  # type: ignore[union-attr]
    assert cancelled.status == "cancelled"
    last: Any = list(endless)[-1]  # of a type that the client does not know
    assert (last.type, last.response["status"]) == ("response.cancelled", "cancelled")
    two_pods.await_idle()


def test_files(turns: Turns[OpenAI]) -> None:
    made = turns.next.files.create(file=("a.jsonl", b'{"a": 1}\n'), purpose="batch")
    assert turns.next.files.retrieve(made.id) == made
    assert made.id in [each.id for each in turns.next.files.list(purpose="batch")]
    assert turns.next.files.content(made.id).read() == b'{"a": 1}\n'
    assert turns.next.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        turns.next.files.content(made.id)


def lines(count: int, endpoint: str, **fields: Any) -> io.BytesIO:
    body = {"model": MODEL, "temperature": 0, **fields}
    rows = [
        {"custom_id": f"line {number}", "method": "POST", "url": endpoint, "body": body}
        for number in range(count)
    ]
    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": STORY["messages"], "max_tokens": 8},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 8},
    "/v1/responses": {"input": "Tell me a story.", "max_output_tokens": 8},
}


@pytest.mark.parametrize("endpoint", BODIES)
def test_batches(endpoint: Any, turns: Turns[OpenAI]) -> None:
    given = turns.next.files.create(
        file=("in.jsonl", lines(5, endpoint, **BODIES[endpoint])), purpose="batch"
    )
    made = turns.next.batches.create(input_file_id=given.id, endpoint=endpoint, completion_window="24h")
    done = wait_until(
        lambda: (now := turns.next.batches.retrieve(made.id)).status == "completed" and now,
        within=60,
        what="it",
    )
    assert made.id in [each.id for each in turns.next.batches.list()]
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed) == (5, 5)
    assert done.error_file_id is None
    rows = [json.loads(row) for row in turns.next.files.content(done.output_file_id or "").text.splitlines()]
    assert sorted(row["custom_id"] for row in rows) == [f"line {number}" for number in range(5)]
    assert {row["response"]["status_code"] for row in rows} == {200}


def test_cancelling_a_batch(two_pods: System, turns: Turns[OpenAI]) -> None:
    endpoint = "/v1/completions"
    long = lines(40, endpoint, prompt="Once", max_tokens=1500, ignore_eos=True)
    given = turns.next.files.create(file=("in.jsonl", long), purpose="batch")
    made = turns.next.batches.create(input_file_id=given.id, endpoint=endpoint, completion_window="24h")
    wait_until(
        lambda: turns.next.batches.retrieve(made.id).status == "in_progress", within=30, what="it to run"
    )
    assert turns.next.batches.cancel(made.id).status in ("cancelling", "cancelled")
    done = wait_until(
        lambda: (now := turns.next.batches.retrieve(made.id)).status == "cancelled" and now,
        within=30,
        what="it",
    )
    assert done.error_file_id
    rows = turns.next.files.content(done.error_file_id).text.splitlines()
    assert {json.loads(row)["error"]["code"] for row in rows} == {"batch_cancelled"}
    two_pods.await_idle()
    assert time.time() > done.created_at
