"""POST /v1/chat/completions: the protocol, as official clients and raw readers see it."""

import asyncio
from collections.abc import Iterable

import openai
import pytest

from llmboost.entries import ChoiceDelta, Delta, TokenLogprob
from llmboost.jobs import GenerationJob
from llmboost.settings import ApiSettings
from llmboost.streams import SEAL_ID
from llmboost_api import sse

from ..waiting import wait_until
from .answers import frames_of
from .api_pod import (
    MODEL,
    ROOT,
    WORDS,
    RunningPod,
    ScriptedWorker,
    Step,
    chat,
    ends,
    says,
    serving,
    settings_for,
)


async def test_stream_is_written_as_documented(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Chunks are the documented ones: role and first text together, an empty one at the end, [DONE]."""
    frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert frames[-1].data == "[DONE]"
    chunks = [frame.json for frame in frames[:-1]]
    job = worker.jobs[0]
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
        assert (chunk["id"], chunk["object"]) == (job.id, "chat.completion.chunk")
        assert (chunk["created"], chunk["model"]) == (int(job.created), MODEL)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": "Once"}, "finish_reason": None}],
        *[[{"index": 0, "delta": {"content": word}, "finish_reason": None}] for word in WORDS[1:]],
        [{"index": 0, "delta": {"content": ""}, "finish_reason": "stop"}],
    ]
    # The last word and the reason came in one entry: the last of its frames has the entry's own id.
    assert [frame.id for frame in frames] == ["1-1", "1-2", "1-3", "1-4", "1-5.1", "1-5", SEAL_ID]


async def test_every_choice_begins_with_its_role(pod: RunningPod, worker: ScriptedWorker) -> None:
    """With n choices, each has its own first chunk and its own last one; a chunk carries one choice."""
    worker.script = lambda job: [
        Delta([ChoiceDelta(0, 0, [1], "a"), ChoiceDelta(1, 0, [1], "x")]),
        Delta([ChoiceDelta(1, 1, [2], "y", "stop"), ChoiceDelta(0, 1, [2], "b", "length")]),
        ends(4),
    ]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True, n=2))
    assert [frame.json["choices"] for frame in frames[:-1]] == [
        [{"index": 0, "delta": {"role": "assistant", "content": "a"}, "finish_reason": None}],
        [{"index": 1, "delta": {"role": "assistant", "content": "x"}, "finish_reason": None}],
        [{"index": 1, "delta": {"content": "y"}, "finish_reason": None}],
        [{"index": 1, "delta": {"content": ""}, "finish_reason": "stop"}],
        [{"index": 0, "delta": {"content": "b"}, "finish_reason": None}],
        [{"index": 0, "delta": {"content": ""}, "finish_reason": "length"}],
    ]


async def test_an_answer_without_text_still_has_a_role(pod: RunningPod, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [*says([""]), ends(1)]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert [frame.json["choices"][0]["delta"] for frame in frames[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": ""},
    ]


async def test_usage_when_asked_for(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Every chunk says `usage: null`, then one without choices carries it, then [DONE]."""
    worker.script = lambda job: [*says(["Hi"]), ends(1, cached=3)]
    body = chat(stream=True, stream_options={"include_usage": True})
    *chunks, last, done = await pod.stream("/v1/chat/completions", body)
    assert [chunk.json["usage"] for chunk in chunks] == [None, None]
    assert (last.json["choices"], last.json["usage"]) == (
        [],
        {
            "prompt_tokens": 5,
            "completion_tokens": 1,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    )
    assert last.json["object"] == "chat.completion.chunk"
    assert done.data == "[DONE]"


async def test_usage_for_everyone(redis_url: str, worker: ScriptedWorker) -> None:
    """--always-include-usage: a usage chunk though nobody asked; the other chunks stay as they are."""
    async with serving(settings_for(redis_url, always_include_usage=True)) as pod:
        *chunks, last, done = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert all("usage" not in chunk.json for chunk in chunks)
    assert last.json["usage"]["total_tokens"] == 10
    assert done.data == "[DONE]"


async def test_event_ids_can_be_switched_off(redis_url: str, worker: ScriptedWorker) -> None:
    async with serving(settings_for(redis_url, event_ids=False)) as pod:
        frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert all(frame.id is None for frame in frames)


async def test_text_travels_unharmed(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Line breaks, quotes, characters of any width: none of them breaks a frame."""
    texts = ["日本", "👩‍👩‍👧\r\n", '"\\', "\n\ndata: [DONE]\n\n", "\u2028\x00\x7f", "é"]
    worker.script = lambda job: [*says(texts), ends(6)]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    got = [frame.json["choices"][0]["delta"].get("content") for frame in frames[:-1]]
    assert got == [*texts, ""]


async def test_tokens_without_text_make_no_chunk(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The bytes of a character arrive over several tokens; their logprobs go with the chunk that shows it."""
    logprobs = [TokenLogprob(name, -0.5, [n]) for n, name in enumerate(["h", "\\xf0", "\\x9f", "!"])]
    worker.script = lambda job: [*says(["h", "", "", "😀!"], logprobs=logprobs), ends(4)]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True, logprobs=True))
    choices = [frame.json["choices"][0] for frame in frames[:-1]]
    assert [choice["delta"].get("content") for choice in choices] == ["h", "😀!", ""]
    assert [
        choice["logprobs"] and [token["token"] for token in choice["logprobs"]["content"]]
        for choice in choices
    ] == [["h"], ["\\xf0", "\\x9f", "!"], None]


async def test_logprobs_of_hidden_last_tokens_are_not_lost(pod: RunningPod, worker: ScriptedWorker) -> None:
    """A stop string's tokens have no text; their logprobs come with the finish reason at the latest."""
    logprobs = [TokenLogprob(name, -0.5) for name in "abc"]
    worker.script = lambda job: [*says(["a", "", ""], logprobs=logprobs), ends(3)]
    frames = await pod.stream("/v1/chat/completions", chat(stream=True, logprobs=True))
    last = frames[-2].json["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({"content": ""}, "stop")
    assert [token["token"] for token in last["logprobs"]["content"]] == ["b", "c"]


async def test_whole_answer(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Not streamed, the same entries make one completion."""
    logprob = TokenLogprob(
        "H", -0.25, [72], (TokenLogprob("H", -0.25, [72]), TokenLogprob("J", float("-inf")))
    )
    worker.script = lambda job: [
        *says(["Hi", " you"], logprobs=[logprob, logprob]),
        *says(["", "Ho"], choice=1, reason="length", logprobs=[logprob, logprob]),
        ends(4),
    ]
    response = await pod.http.post(
        "/v1/chat/completions", json=chat(n=2, logprobs=True, top_logprobs=2, seed=-1)
    )
    answer = response.json()
    job = worker.jobs[0]
    assert response.headers["x-request-id"] == answer["id"] == job.id
    assert (answer["object"], answer["model"], answer["created"]) == (
        "chat.completion",
        MODEL,
        int(job.created),
    )
    assert [choice["message"] for choice in answer["choices"]] == [
        {"role": "assistant", "content": "Hi you", "refusal": None},
        {"role": "assistant", "content": "Ho", "refusal": None},
    ]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    token = answer["choices"][0]["logprobs"]["content"][0]
    assert (token["token"], token["logprob"], token["bytes"]) == ("H", -0.25, [72])
    assert [each["logprob"] for each in token["top_logprobs"]] == [-0.25, -9999.0]
    assert answer["usage"]["total_tokens"] == 9
    assert (job.sampling.n, job.sampling.top_logprobs, job.sampling.seed) == (2, 2, -1)


async def test_job_says_what_was_asked(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Every parameter reaches the worker; the alias is resolved; the seed is fixed here."""
    asked = {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "stop": "END",
        "max_completion_tokens": 7,
        "presence_penalty": -2,
        "frequency_penalty": 2,
        "repetition_penalty": 1.1,
        "logit_bias": {"42": -100},
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [7],
        "include_stop_str_in_output": True,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "response_format": {"type": "text"},
        "tools": None,
    }
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}],
            "name": "A",
        },
    ]
    response = await pod.http.post("/v1/chat/completions", json=chat(**asked, messages=messages))
    assert response.status_code == 200, response.text
    again = await pod.http.post("/v1/chat/completions", json=chat(**asked, messages=messages))
    assert again.status_code == 200
    job, other = worker.jobs
    assert job.model == ROOT
    assert job.prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\nyou", "name": "A"},
    ]
    sampling = job.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 0, 0.1)
    assert (sampling.stop, sampling.max_tokens, sampling.min_tokens) == (("END",), 7, 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 2.0)
    assert (sampling.repetition_penalty, sampling.logit_bias) == (1.1, {42: -100.0})
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((7,), True)
    assert sampling.include_stop_str_in_output
    assert sampling.top_logprobs is None
    assert sampling.seed != other.sampling.seed
    assert job.deadline - job.created == pytest.approx(ApiSettings().request_timeout, abs=0.01)


# Official clients


async def test_official_async_client(pod: RunningPod, worker: ScriptedWorker) -> None:
    stream = await pod.openai.chat.completions.create(**chat(stream=True, max_tokens=1024))
    chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].delta.content for chunk in chunks] == [*WORDS, ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * len(WORDS) + ["stop"]
    whole = await pod.openai.chat.completions.create(**chat())
    assert whole.choices[0].message.content == "".join(WORDS)
    assert whole.usage is not None
    assert whole.usage.total_tokens == 10


async def test_the_service_tier_is_the_class_of_the_job(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The answer, and each chunk, names the tier that was used; but only if the request named one."""
    create = pod.openai.chat.completions.create
    for asked, used, job_class in [
        ("flex", "flex", "batch"),
        ("auto", "default", "interactive"),
        ("default", "default", "interactive"),
        (None, None, "interactive"),
    ]:
        tier = {} if asked is None else {"service_tier": asked}
        whole = await create(**chat(**tier))
        chunks = [chunk async for chunk in await create(**chat(stream=True, **tier))]
        assert {each.service_tier for each in (whole, *chunks)} == {used}
        assert {job.job_class for job in worker.jobs[-2:]} == {job_class}
    legacy = await pod.openai.completions.create(
        model=MODEL, prompt="Hi", extra_body={"service_tier": "flex"}
    )
    assert legacy.model_extra is not None
    assert legacy.model_extra["service_tier"] == "flex"
    assert worker.jobs[-1].job_class == "batch"


async def test_official_sync_client(pod: RunningPod, worker: ScriptedWorker) -> None:
    def texts() -> list[str | None]:
        with openai.OpenAI(base_url=f"{pod.url}/v1", api_key="-") as client:
            return [
                chunk.choices[0].delta.content
                for chunk in client.chat.completions.create(**chat(stream=True))
                if chunk.choices
            ]

    assert await asyncio.to_thread(texts) == [*WORDS, ""]


async def test_official_client_endures_pings(
    redis_url: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep-alives every 50 ms between chunks that have `id:` lines disturb no official client."""
    pings = 0

    def counted_ping() -> bytes:
        nonlocal pings
        pings += 1
        return sse.PING

    async def two_pings() -> None:
        seen = pings
        await wait_until(lambda: pings >= seen + 2)

    def script(job: GenerationJob) -> Iterable[Step]:
        for delta in says(WORDS):
            yield two_pings()
            yield delta
        yield two_pings()
        yield ends()

    worker.script = script
    monkeypatch.setattr(sse, "ping", counted_ping)
    async with serving(settings_for(redis_url, ping_interval=0.05, headers_after=0)) as pod:
        stream = await pod.openai.chat.completions.create(**chat(stream=True))
        assert [chunk.choices[0].delta.content async for chunk in stream] == [*WORDS, ""]
        response = await pod.http.post("/v1/chat/completions", json=chat(stream=True))
    assert response.text.count(": ping\n") >= 2 * len(WORDS)
    assert ": ping\n\n" not in response.text
    assert len(frames_of(response.text)) == len(WORDS) + 2
