"""POST /v1/responses: what may be asked, and what comes back."""

import asyncio
from typing import Any

import pytest
from openai import BadRequestError

from llmboost.entries import TokenLogprob
from llmboost.streams import TokenStreams

from .answers import check_error
from .api_pod import MODEL, ROOT, WORDS, RunningPod, ScriptedWorker, ends, fails, says
from .responses import DONE, EVENTS, RESPONSES, ask, check_response, events_in, get, kinds, stream_of, text_of

STORY = "".join(WORDS)


async def test_the_official_client_gets_a_response(pod: RunningPod, worker: ScriptedWorker) -> None:
    response = await pod.openai.responses.create(
        model=MODEL, input="Hello", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5, user="me"
    )
    check_response(response.to_dict(mode="python"))
    assert (response.status, response.output_text, response.object) == ("completed", STORY, "response")
    assert response.id.startswith("resp_")
    assert response.output[0].id is not None
    assert response.output[0].id.startswith("msg_")
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (5, 5)
    assert response.completed_at is not None
    assert response.completed_at >= response.created_at - 1
    assert response.error is None
    assert response.incomplete_details is None
    (job,) = worker.jobs
    assert (job.id, job.model, job.needs_audience) == (response.id, ROOT, True)
    assert job.prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert await pod.openai.responses.retrieve(response.id) == response


async def test_events_come_in_openais_order(pod: RunningPod, worker: ScriptedWorker) -> None:
    events = events_in(await stream_of(pod))
    assert kinds(events) == [*EVENTS, *["output_text.delta"] * len(WORDS), *DONE, "completed"]
    assert [event.number for event in events] == list(range(len(events)))
    assert text_of(events) == STORY
    final = check_response(events[-1].data["response"])
    assert (final.status, final.output_text) == ("completed", STORY)
    assert check_response(events[0].data["response"]).status == "in_progress"
    assert {event.data["item_id"] for event in events if "item_id" in event.data} == {final.output[0].id}
    assert await get(pod, final.id) == final


async def test_the_clients_stream_helper_follows(pod: RunningPod, worker: ScriptedWorker) -> None:
    async with pod.openai.responses.stream(model=MODEL, input="Hello") as stream:
        snapshots = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert snapshots[-1] == final.output_text == STORY


async def test_out_of_tokens_is_incomplete(pod: RunningPod, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [*says(WORDS, reason="length"), ends()]
    whole = await pod.openai.responses.create(model=MODEL, input="Hello", max_output_tokens=5)
    assert whole.status == "incomplete"
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.output[0].status == "incomplete"
    assert whole.output_text == STORY
    assert worker.jobs[0].sampling.max_tokens == 5
    events = events_in(await stream_of(pod))
    assert kinds(events)[-4:] == [*DONE, "incomplete"]


async def test_an_answer_without_text_is_an_empty_message(pod: RunningPod, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [*says([""]), ends(1)]
    events = events_in(await stream_of(pod))
    assert kinds(events) == [*EVENTS, *DONE, "completed"]
    assert check_response(events[-1].data["response"]).output_text == ""


async def test_logprobs_come_when_they_are_included(pod: RunningPod, worker: ScriptedWorker) -> None:
    """A token without a visible character has its logprob go with the next text."""
    top = (TokenLogprob("a", -0.5, [97]), TokenLogprob("b", float("-inf"), None))
    each = [TokenLogprob(word, -0.5, list(word.encode()), top) for word in ("a", "b", "c")]
    worker.script = lambda job: [*says(["a", "", "c"], logprobs=each), ends(3)]
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    events = events_in(await stream_of(pod, **fields))
    assert worker.jobs[0].sampling.top_logprobs == 2
    deltas = [event.data for event in events if event.type == "response.output_text.delta"]
    assert [[token["token"] for token in delta["logprobs"]] for delta in deltas] == [["a"], ["b", "c"]]
    (content,) = check_response(events[-1].data["response"]).output[0].content
    assert [token.token for token in content.logprobs] == ["a", "b", "c"]
    assert content.logprobs[0].top_logprobs[1].logprob == -9999
    await pod.http.post(RESPONSES, json=ask())
    assert worker.jobs[1].sampling.top_logprobs is None


async def test_an_early_failure_has_its_own_status(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Streamed or not, as with chat; and what is kept of it says so."""
    worker.script = lambda job: [
        fails("Too long.", type="invalid_request_error", code="context_length_exceeded", status=400)
    ]
    for stream in (True, False):
        response = await pod.http.post(RESPONSES, json=ask(stream=stream))
        assert check_error(response, 400, "context_length_exceeded") == "Too long."
        kept = await get(pod, response.headers["x-request-id"])
        assert kept.status == "failed"
        assert kept.error is not None
        assert (kept.error.code, kept.error.message) == ("invalid_prompt", "Too long.")
        again = await pod.http.get(f"{RESPONSES}/{kept.id}?stream=true")
        assert kinds(events_in(again.text)) == ["created", "in_progress", "failed"]


async def test_a_failure_in_mid_stream_is_an_event(pod: RunningPod, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [*says(["Once"], reason=None), fails("It broke.", code="tries_used_up")]
    events = events_in(await stream_of(pod))
    assert kinds(events) == [*EVENTS, "output_text.delta", "failed"]
    failed = check_response(events[-1].data["response"])
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.message) == ("failed", "server_error", "It broke.")
    assert failed.output_text == "Once"
    assert failed.output[0].status == "incomplete"


async def test_what_the_server_gave_may_be_sent_back(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Output as input, as objects of the official package or as the JSON that came."""
    first = await pod.openai.responses.create(model=MODEL, input="Hello")
    second = await pod.openai.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
            *first.output,
            {"role": "developer", "content": "Be brief.", "type": "message"},
            {"role": "user", "content": "Go on."},
        ],
    )
    listed = await pod.openai.responses.input_items.list(second.id, order="asc")
    raw = [item.to_dict(mode="python") for item in listed.data]
    await pod.http.post(RESPONSES, json=ask(input=raw))
    expected = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": STORY},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go on."},
    ]
    assert [job.prompt.messages for job in worker.jobs[1:]] == [expected, expected]


@pytest.mark.parametrize(
    ("fields", "param", "says_so"),
    [
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "empty"),
        (
            {"input": [{"type": "function_call_output", "output": "", "call_id": "1"}]},
            "input",
            "messages",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", "item_reference"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content",
            "text only",
        ),
        ({"input": [{"role": "critic", "content": ""}]}, "input[0].role", "critic"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "missing"),
        (
            {"text": {"format": {"type": "json_object"}}, "guided_regex": "a"},
            "guided_regex",
            "text.format",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
        ({"truncation": "auto"}, "truncation", "auto"),
        ({"background": True, "store": False}, "background", "store"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "not supported"),
        ({"max_tool_calls": 1}, "max_tool_calls", "not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools", "not supported"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"include": ["nonsense"]}, "include[0]", "nonsense"),
        ({"top_logprobs": 3}, "top_logprobs", "include"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"n": 2}, "n", "at most 1"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"metadata": {"a": 1}}, "metadata", "strings"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, None, "not supported"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not found"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    pod: RunningPod, worker: ScriptedWorker, fields: dict[str, Any], param: str | None, says_so: str
) -> None:
    response = await pod.http.post(RESPONSES, json=ask(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == (param or "stream_options.include_obfuscation")
    assert says_so in error["message"]
    assert not worker.jobs


async def test_what_changes_nothing_is_taken(pod: RunningPod, worker: ScriptedWorker) -> None:
    response = await pod.openai.responses.create(
        model=MODEL,
        input="Hello",
        tools=[],
        tool_choice="none",
        parallel_tool_calls=False,
        reasoning={},
        text={"format": {"type": "text"}, "verbosity": "medium"},
        truncation="disabled",
        include=["reasoning.encrypted_content"],
        safety_identifier="s",
        prompt_cache_key="p",
        service_tier="auto",
        extra_body={"seed": 3, "top_k": 5, "min_p": 0.1, "stop": "x", "conversation": None, "min_tokens": 2},
    )
    assert (response.tool_choice, response.parallel_tool_calls) == ("none", False)
    assert (response.prompt_cache_key, response.safety_identifier) == ("p", "s")
    sampling = worker.jobs[0].sampling
    assert (sampling.seed, sampling.top_k, sampling.min_p, sampling.stop) == (3, 5, 0.1, ("x",))


async def test_a_request_sent_again_joins_the_first(
    pod: RunningPod, worker: ScriptedWorker, streams: TokenStreams
) -> None:
    """With its idempotency key: streamed, whole and in the background; another body is refused."""
    go = asyncio.Event()
    worker.script = lambda job: [says(WORDS)[0], go.wait(), *says(WORDS)[1:], ends()]
    headers = {"Idempotency-Key": "k"}
    first = await pod.openai.responses.create(model=MODEL, input="x", background=True, extra_headers=headers)
    again = await pod.openai.responses.create(model=MODEL, input="x", background=True, extra_headers=headers)
    assert first.id == again.id
    assert first.status == "queued"
    go.set()
    other = await pod.http.post(RESPONSES, json=ask(input="y"), headers=headers)
    check_error(other, 409, "idempotency_key_reused", "Idempotency-Key")
    texts = [
        (await pod.http.post(RESPONSES, json=ask(stream=True), headers={"Idempotency-Key": "s"})).text
        for _ in range(2)
    ]
    assert events_in(texts[0]) == events_in(texts[1])
    assert len(worker.jobs) == 2


async def test_a_request_sent_again_needs_nothing_but_its_answer(
    pod: RunningPod, worker: ScriptedWorker
) -> None:
    """What it followed may have been deleted since."""
    previous = await pod.openai.responses.create(model=MODEL, input="x")
    again = {"model": MODEL, "input": "y", "previous_response_id": previous.id}
    first = await pod.http.post(RESPONSES, json=again, headers={"Idempotency-Key": "k"})
    await pod.openai.responses.delete(previous.id)
    second = await pod.http.post(RESPONSES, json=again, headers={"Idempotency-Key": "k"})
    assert (second.status_code, second.content) == (200, first.content)
    other = await pod.http.post(RESPONSES, json={**again, "input": "z"}, headers={"Idempotency-Key": "k"})
    check_error(other, 409, "idempotency_key_reused", "Idempotency-Key")


async def test_the_official_client_raises_what_is_refused(pod: RunningPod, worker: ScriptedWorker) -> None:
    with pytest.raises(BadRequestError) as refused:
        await pod.openai.responses.create(model=MODEL, input="x", previous_response_id="resp_123")
    assert (refused.value.code, refused.value.param) == (
        "previous_response_not_found",
        "previous_response_id",
    )
