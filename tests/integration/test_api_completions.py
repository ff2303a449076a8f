"""POST /v1/completions: several prompts are several jobs behind one answer."""

import asyncio
from typing import Any

import openai
import pytest
from arq.connections import ArqRedis

from llmboost.entries import ChoiceDelta, Delta, TokenLogprob
from llmboost.jobs import GenerationJob, Prompt
from llmboost.streams import TokenStreams

from ..waiting import wait_until
from .api_pod import (
    MODEL,
    WORDS,
    RunningPod,
    ScriptedWorker,
    ends,
    fails,
    says,
    serving,
    settings_for,
    working,
)


def asks(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


def parrot(job: GenerationJob) -> list[Any]:
    """Each choice says its prompt and its number."""
    said = job.prompt.text or "".join(map(str, job.prompt.token_ids or []))
    steps: list[Any] = []
    for choice in range(job.sampling.n):
        steps += says([said, f"/{choice}"], choice=choice)
    return [*steps, ends(2 * job.sampling.n, prompt_tokens=3)]


async def test_stream_has_text_in_its_choices(pod: RunningPod, worker: ScriptedWorker) -> None:
    frames = await pod.stream("/v1/completions", asks("Say", stream=True))
    chunks = [frame.json for frame in frames[:-1]]
    assert frames[-1].data == "[DONE]"
    job = worker.jobs[0]
    assert {(chunk["id"], chunk["object"], chunk["model"]) for chunk in chunks} == {
        (job.id, "text_completion", MODEL)
    }
    assert [chunk["choices"] for chunk in chunks] == [
        *[[{"index": 0, "text": word, "logprobs": None, "finish_reason": None}] for word in WORDS],
        [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}],
    ]
    assert job.prompt == Prompt(text="Say")
    assert job.sampling.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", [Prompt(text="a")]),
        ("", [Prompt(text="")]),
        (["a", "b", "c"], [Prompt(text="a"), Prompt(text="b"), Prompt(text="c")]),
        ([1, 2, 3], [Prompt(token_ids=[1, 2, 3])]),
        ([[1, 2], [3]], [Prompt(token_ids=[1, 2]), Prompt(token_ids=[3])]),
    ],
)
async def test_every_form_of_prompt(
    pod: RunningPod, worker: ScriptedWorker, prompt: Any, prompts: list[Prompt]
) -> None:
    """Choices are numbered prompt by prompt, streamed or not, and the usage is that of all."""
    worker.script = parrot
    response = await pod.http.post("/v1/completions", json=asks(prompt, n=2))
    answer = response.json()
    by_id = {job.id: job for job in worker.jobs}
    assert len(by_id) == len(prompts)
    ids = [answer["id"], *[f"{answer['id']}-{number}" for number in range(1, len(prompts))]]
    assert [by_id[job_id].prompt for job_id in ids] == prompts
    said = ["".join(map(str, each.token_ids)) if each.token_ids else each.text for each in prompts]
    expected = [f"{text}/{choice}" for text in said for choice in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    total = {"prompt_tokens": 3 * len(prompts), "completion_tokens": 4 * len(prompts)}
    assert total.items() <= answer["usage"].items()

    body = asks(prompt, n=2, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = await pod.stream("/v1/completions", body)
    texts = [""] * len(expected)
    for chunk in chunks:
        (choice,) = chunk.json["choices"]
        texts[choice["index"]] += choice["text"]
        assert chunk.json["id"] == usage.json["id"]
    assert texts == expected
    assert total.items() <= usage.json["usage"].items()
    assert done.data == "[DONE]"
    # A cursor is a place in one stream.
    assert (done.id is None) == (len(prompts) > 1)


async def test_jobs_are_read_side_by_side(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The second prompt's text is not held back until the first prompt has its own."""
    seen = asyncio.Event()
    worker.script = lambda job: [*([seen.wait()] if job.prompt.text == "a" else []), *parrot(job)]
    async with pod.begun("/v1/completions", asks(["a", "b"], stream=True)) as stream:
        assert '"text":"b"' in stream.events[0]
        seen.set()
        assert (await stream.finish()).endswith("data: [DONE]\n\n")


async def test_one_failed_prompt_fails_the_request(pod: RunningPod, worker: ScriptedWorker) -> None:
    worker.script = lambda job: [fails("Too long.", status=400)] if job.prompt.text == "b" else parrot(job)
    response = await pod.http.post("/v1/completions", json=asks(["a", "b"]))
    assert (response.status_code, response.json()["error"]["message"]) == (400, "Too long.")
    await wait_until(lambda: not pod.generations)


async def test_logprobs_are_flat(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Parallel lists; offsets count characters of this choice, over all its chunks."""
    tokens = [
        TokenLogprob("He", -0.5, None, (TokenLogprob("He", -0.5), TokenLogprob("Yo", -1.5))),
        TokenLogprob("llo", -3.0, None, (TokenLogprob("y", -0.1),)),
    ]
    worker.script = lambda job: [*says(["He", "llo"], logprobs=tokens), ends(2)]
    response = await pod.http.post("/v1/completions", json=asks("Say", logprobs=2))
    assert response.json()["choices"][0]["logprobs"] == {
        "tokens": ["He", "llo"],
        "token_logprobs": [-0.5, -3.0],
        "top_logprobs": [{"He": -0.5, "Yo": -1.5}, {"y": -0.1, "llo": -3.0}],
        "text_offset": [0, 2],
    }
    frames = await pod.stream("/v1/completions", asks("Say", logprobs=2, stream=True))
    offsets = [frame.json["choices"][0]["logprobs"] for frame in frames[:-1]]
    assert [each and each["text_offset"] for each in offsets] == [[0], [2], None]
    assert worker.jobs[0].sampling.top_logprobs == 2


async def test_logprobs_of_an_echo_begin_with_the_prompts(pod: RunningPod, worker: ScriptedWorker) -> None:
    """The first token follows nothing. One that is no part of the text moves nothing on, nor does part of a
    character."""
    prompt = [
        TokenLogprob("<s>", None, None, (), 0),
        TokenLogprob("Say", -1.0, None, (TokenLogprob("See", -0.5),), 3),
        TokenLogprob("\ufffd", -2.0, [0xC3], (), 0),
        TokenLogprob("\ufffd", -3.0, [0xA9], (), 1),
    ]
    output = [TokenLogprob("He", -0.5), TokenLogprob("llo", float("-inf"))]

    def script(job: GenerationJob) -> list[Any]:
        opening = Delta([ChoiceDelta(0, 0, [], "Sayé", None, prompt)])
        return [opening, *says(["He", "llo"], logprobs=output), ends(2)]

    worker.script = script
    body = asks("Sayé", echo=True, logprobs=1)
    response = await pod.http.post("/v1/completions", json=body)
    choice = response.json()["choices"][0]
    assert choice["text"] == "SayéHello"
    assert choice["logprobs"] == {
        "tokens": ["<s>", "Say", "\ufffd", "\ufffd", "He", "llo"],
        "token_logprobs": [None, -1.0, -2.0, -3.0, -0.5, -9999.0],
        "top_logprobs": [
            None,
            {"See": -0.5, "Say": -1.0},
            {"\ufffd": -2.0},
            {"\ufffd": -3.0},
            {"He": -0.5},
            {"llo": -9999.0},
        ],
        "text_offset": [0, 0, 3, 3, 4, 6],
    }
    sampling = worker.jobs[0].sampling
    assert (sampling.top_logprobs, sampling.prompt_logprobs) == (1, 1)
    frames = await pod.stream("/v1/completions", {**body, "stream": True})
    parts = [frame.json["choices"][0]["logprobs"] for frame in frames[:-1]]
    for name, values in choice["logprobs"].items():
        assert [value for part in parts if part for value in part[name]] == values
    assert (await pod.openai.completions.create(**body)).choices[0].logprobs is not None


async def test_only_with_both_are_the_prompts_logprobs_computed(
    pod: RunningPod, worker: ScriptedWorker
) -> None:
    for fields in ({"logprobs": 1}, {"echo": True}):
        await pod.http.post("/v1/completions", json=asks("Say", **fields))
    assert [job.sampling.prompt_logprobs for job in worker.jobs] == [None, None]


async def test_echo_is_the_workers_to_do(pod: RunningPod, worker: ScriptedWorker) -> None:
    """`max_tokens: 0` with echo asks for the prompt alone."""
    worker.script = lambda job: [*says([job.prompt.text or ""], reason="length"), ends(0)]
    response = await pod.http.post("/v1/completions", json=asks("Say", echo=True, max_tokens=0))
    assert response.json()["choices"][0]["text"] == "Say"
    assert worker.jobs[0].echo
    assert worker.jobs[0].sampling.max_tokens == 0


async def test_official_client(pod: RunningPod, worker: ScriptedWorker) -> None:
    stream = await pod.openai.completions.create(model=MODEL, prompt="Say", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "".join(WORDS)
    whole = await pod.openai.completions.create(model=MODEL, prompt=["a", "b"], best_of=1)
    assert [choice.text for choice in whole.choices] == ["".join(WORDS)] * 2


async def test_a_full_queue_takes_all_prompts_or_none(
    redis: ArqRedis, streams: TokenStreams, redis_url: str
) -> None:
    """429 with a time to come back; what had been enqueued is withdrawn, so nothing of it runs."""
    async with serving(settings_for(redis_url, max_queued=2)) as pod:
        async with working(redis, streams) as worker:
            queue = worker.queue
        # That worker has gone, but its model's name is still accepted.
        response = await pod.http.post("/v1/completions", json=asks(["a", "b", "c"]))
        assert response.status_code == 429
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert response.headers["retry-after"] == "1"
        assert "x-should-retry" not in response.headers

        async def empty() -> bool:
            return await queue.depth("llama", "interactive") == 0

        await wait_until(empty)
        with pytest.raises(openai.RateLimitError):
            await pod.openai.with_options(max_retries=0).completions.create(
                model=MODEL, prompt=["a", "b", "c"]
            )
        await wait_until(empty)
