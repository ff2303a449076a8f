"""Every sampling parameter is honoured for its own request, whatever its neighbours in the batch ask for."""

import asyncio
import math
from typing import Any

import pytest

from llmboost.streams import TokenStreams
from tests.e2e.asking import (
    ask,
    bytes_of,
    chat,
    completion,
    create,
    hear,
    long_story,
    text_of,
    token_ids,
)
from tests.e2e.system import System

PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "frequency_penalty": 1.5},
    {"temperature": 0, "presence_penalty": 2.0},
    {"temperature": 0, "frequency_penalty": -0.5, "ignore_eos": True},
    {"temperature": 0, "logit_bias": {"300": 100}},
    {"temperature": 0, "logit_bias": {str(token): -100 for token in range(200, 900)}},
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "ignore_eos": True},
    {"top_p": 0.5},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.9, "top_k": 50, "min_p": 0.01, "temperature": 1.5},
    {"min_tokens": 20},
    {"ignore_eos": True},
    {"stop": [" the", "a"]},
    {"stop": "e", "min_tokens": 12},
    {"stop": ["the"], "include_stop_str_in_output": True},
    {"stop_token_ids": list(range(300, 400))},
    {"n": 3},
    {"n": 2, "temperature": 0},
    {"logprobs": True, "top_logprobs": 5},
    {"logprobs": True, "temperature": 0},
    {"repetition_penalty": 0.8, "presence_penalty": -1.0, "ignore_eos": True},
]
"""Each is one request of the mixed load; there and alone they have the same seed."""


def requests() -> list[dict[str, Any]]:
    mixed = [
        chat(seed=number, max_tokens=16 + number % 9, **parameters)
        for number, parameters in enumerate(PARAMETERS)
    ]
    plain = [{k: v for k, v in parameters.items() if "logprobs" not in k} for parameters in PARAMETERS]
    mixed += [
        completion("Mia said", seed=number, max_tokens=24 - number % 9, **parameters)
        for number, parameters in enumerate(plain[::3])
    ]
    mixed += [completion("Once", seed=7, max_tokens=12, logprobs=2), completion("Once", seed=7, echo=True)]
    return mixed


def essence(answer: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on the batch: all but the id, the time, the last digits of logprobs, and what was
    cached."""
    choices = []
    for choice in answer["choices"]:
        logprobs = choice.pop("logprobs")
        tokens = []
        if logprobs is not None and "content" in logprobs:
            tokens = [(token["token"], round(token["logprob"], 2)) for token in logprobs["content"]]
        elif logprobs is not None:
            values = [round(logprob, 2) for logprob in logprobs["token_logprobs"]]
            tokens = list(zip(logprobs["tokens"], values, strict=True))
        choices.append({**choice, "tokens": tokens})
    answer["usage"].pop("prompt_tokens_details")
    return {"choices": choices, "usage": answer["usage"], "object": answer["object"]}


async def test_each_in_the_mix_is_as_if_alone(system: System) -> None:
    """One load with every parameter in it: each seeded request gets to the letter what it gets when it is
    alone, with the same usage and finish reasons."""
    bodies = requests()
    async with system.async_http() as http:
        together = await asyncio.gather(*(ask(http, body) for body in bodies))
        alone = [await ask(http, body) for body in bodies]
    for body, one, other in zip(bodies, together, alone, strict=True):
        assert essence(one) == essence(other), body


async def test_max_tokens(system: System, streams: TokenStreams) -> None:
    """So many tokens and no more, `length` as the reason, and usage that counts them."""
    async with system.async_http() as http:
        for most in (1, 2, 17):
            answer = await ask(http, long_story(most, seed=1))
            assert answer["choices"][0]["finish_reason"] == "length"
            assert answer["usage"]["completion_tokens"] == most == len(await token_ids(streams, answer["id"]))
        newer = await ask(http, chat(max_completion_tokens=3, ignore_eos=True))
        assert newer["usage"]["completion_tokens"] == 3


async def test_without_max_tokens_a_completion_has_16(system: System) -> None:
    """OpenAI's default on the older endpoint."""
    async with system.async_http() as http:
        answer = await ask(http, completion(ignore_eos=True))
    assert answer["usage"]["completion_tokens"] == 16


async def test_min_tokens_and_ignore_eos(system: System, streams: TokenStreams) -> None:
    """Where a model would end at once, `min_tokens` keeps it going that far and no further than it wants, and
    `ignore_eos` to the limit."""
    end = {"2": 100}  # the demo model's <|im_end|>
    async with system.async_http() as http:
        at_once = await ask(http, chat(seed=1, logit_bias=end, max_tokens=30))
        assert (at_once["usage"]["completion_tokens"], text_of(at_once)) == (1, "")
        assert at_once["choices"][0]["finish_reason"] == "stop"
        later = await ask(http, chat(seed=1, logit_bias=end, max_tokens=30, min_tokens=10))
        assert later["choices"][0]["finish_reason"] == "stop"
        assert 10 <= later["usage"]["completion_tokens"] <= 11
        ids = await token_ids(streams, later["id"])
        assert ids.count(2) == 1
        never = await ask(http, chat(seed=1, logit_bias=end, max_tokens=30, ignore_eos=True))
        assert never["choices"][0]["finish_reason"] == "length"
        assert await token_ids(streams, never["id"]) == [2] * 30


async def test_logit_bias(system: System, streams: TokenStreams) -> None:
    """+100 forces a token, -100 bans it, for the request that asks and no other."""
    async with system.async_http() as http:
        free, forced = await asyncio.gather(
            ask(http, long_story(12, temperature=0)), ask(http, long_story(12, logit_bias={"777": 100}))
        )
        ids = await token_ids(streams, free["id"])
        assert await token_ids(streams, forced["id"]) == [777] * 12
        banned = await ask(http, long_story(12, temperature=0, logit_bias={str(ids[0]): -100}))
        assert ids[0] not in await token_ids(streams, banned["id"])
        only = {str(token): 100 for token in (500, 600, 700)}
        among = await ask(http, long_story(24, temperature=2, logit_bias=only))
        assert set(await token_ids(streams, among["id"])) <= {500, 600, 700}


@pytest.mark.parametrize("cold", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}])
async def test_what_leaves_one_token_is_greedy(system: System, cold: dict[str, Any]) -> None:
    """top_k 1, a tiny top_p, min_p 1 and a temperature near 0 give the greedy answer, whatever the seed."""
    async with system.async_http() as http:
        greedy, *others = await asyncio.gather(
            ask(http, chat(temperature=0, max_tokens=30)),
            *(ask(http, chat(seed=seed, max_tokens=30, **cold)) for seed in range(3)),
        )
    assert [text_of(other) for other in others] == [text_of(greedy)] * 3


async def test_top_k_draws_from_the_likeliest(system: System) -> None:
    """With top_k 2 each token is one of its position's two likeliest, and not always the first."""
    body = long_story(60, seed=4, top_k=2, temperature=2, logprobs=True, top_logprobs=2)
    async with system.async_http() as http:
        answer = await ask(http, body)
    tokens = answer["choices"][0]["logprobs"]["content"]
    ranks = [[top["token"] for top in token["top_logprobs"]].index(token["token"]) for token in tokens]
    assert set(ranks) == {0, 1}


async def test_penalties(system: System, streams: TokenStreams) -> None:
    """At their extremes the penalties do what they say: no token comes twice; of three tokens that have the
    same bias none is left out for long; or one of them soon comes alone."""
    three = {str(token): 100 for token in (500, 600, 700)}
    async with system.async_http() as http:
        answers = await asyncio.gather(
            ask(http, long_story(40, temperature=0, repetition_penalty=100)),
            ask(http, long_story(90, temperature=0, logit_bias=three, frequency_penalty=2)),
            ask(http, long_story(60, temperature=0, logit_bias=three, frequency_penalty=-2)),
        )
    once, fair, alone = [await token_ids(streams, answer["id"]) for answer in answers]
    assert len(set(once)) == 40
    assert min(fair.count(token) for token in (500, 600, 700)) >= 15
    assert len(set(alone[-20:])) == 1


async def test_n(system: System) -> None:
    """n choices differ from one another, are the same again with the same seed, streamed or not, and the
    usage counts the tokens of all and the prompt once."""
    body = long_story(20, seed=9, n=3)
    async with system.async_http() as http, system.async_openai() as client:
        three, again, one = [await ask(http, each) for each in (body, body, {**body, "n": 1})]
        streamed, usage = {0: "", 1: "", 2: ""}, None
        chunks = await create(client, {**body, "stream": True, "stream_options": {"include_usage": True}})
        async for chunk in chunks:
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
            usage = chunk.usage or usage
    texts = [text_of(three, index) for index in range(3)]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [text_of(again, index) for index in range(3)] == list(streamed.values())
    assert text_of(one) == texts[0]
    assert three["usage"]["completion_tokens"] == 60
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert usage is not None
    assert usage.completion_tokens == 60


async def test_seeds(system: System) -> None:
    """Other seeds give other answers, and so does no seed each time; a negative one is a seed too."""
    async with system.async_http() as http:
        answers = await asyncio.gather(
            *(ask(http, long_story(20, seed=seed)) for seed in (0, 1, -1, 2**63 - 1, -(2**63))),
            *(ask(http, long_story(20)) for _ in range(3)),
        )
    assert len({text_of(answer) for answer in answers}) == len(answers)


async def test_chat_logprobs(system: System) -> None:
    """Per token its logprob and its rivals, best first; probabilities that sum to no more than 1; the drawn
    one first when greedy; the same numbers in a stream."""
    body = chat(max_tokens=15, temperature=0, ignore_eos=True, logprobs=True, top_logprobs=20)
    async with system.async_http() as http, system.async_openai() as client:
        answer = await ask(http, body)
        streamed = []
        async for chunk in await create(client, {**body, "stream": True}):
            for choice in chunk.choices:
                streamed += (choice.logprobs and choice.logprobs.content) or []
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 15
    for token in tokens:
        assert token.keys() == {"token", "logprob", "bytes", "top_logprobs"}
        top = [rival["logprob"] for rival in token["top_logprobs"]]
        assert len(top) == 20
        assert top == sorted(top, reverse=True)
        assert sum(map(math.exp, top)) <= 1 + 1e-5
        assert token["top_logprobs"][0]["token"] == token["token"]
        assert token["top_logprobs"][0]["logprob"] == token["logprob"]
    spoken = [token for token in tokens if not token["token"].startswith("<|")]
    assert bytes_of(spoken).decode(errors="replace") == text_of(answer)
    assert [token.token for token in streamed] == [token["token"] for token in tokens]
    assert [token.logprob for token in streamed] == pytest.approx(
        [token["logprob"] for token in tokens], abs=1e-3
    )


async def test_logprobs_are_the_models_own(system: System) -> None:
    """Logprobs are of the model's distribution: neither temperature nor filters nor bias change them."""
    body = chat(max_tokens=1, logprobs=True, top_logprobs=3, seed=1)
    async with system.async_http() as http:
        changes = ({}, {"temperature": 0}, {"temperature": 2, "top_k": 1}, {"logit_bias": {"777": 100}})
        answers = [await ask(http, {**body, **changed}) for changed in changes]
    tops = [answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in answers]
    for top in tops[1:]:
        assert [rival["token"] for rival in top] == [rival["token"] for rival in tops[0]]
        assert [rival["logprob"] for rival in top] == pytest.approx(
            [rival["logprob"] for rival in tops[0]], abs=1e-3
        )
    assert math.exp(answers[3]["choices"][0]["logprobs"]["content"][0]["logprob"]) < 0.5


async def test_completion_logprobs(system: System) -> None:
    """The older endpoint's form: parallel lists, offsets that add up, and the drawn token among the top."""
    async with system.async_http() as http:
        answer = await ask(http, completion(seed=2, max_tokens=10, logprobs=4, ignore_eos=True))
    logprobs = answer["choices"][0]["logprobs"]
    assert {len(part) for part in logprobs.values()} == {10}
    offset = 0
    for token, logprob, top, at in zip(
        logprobs["tokens"],
        logprobs["token_logprobs"],
        logprobs["top_logprobs"],
        logprobs["text_offset"],
        strict=True,
    ):
        assert at == offset
        assert top[token] == logprob <= 0
        assert len(top) in (4, 5)
        offset += len(token)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(system: System, stream: bool) -> None:
    """With echo a choice begins with the prompt's text, also of token ids, and alone with max_tokens 0; the
    usage counts only what was generated."""
    async with system.async_http() as http, system.async_openai() as client:

        async def answer(**fields: Any) -> str:
            body = completion(seed=1, max_tokens=8, ignore_eos=True, **fields)
            return (await hear(client, body)).text if stream else text_of(await ask(http, body))

        prompt = "Once upon a time, 日本 😀"
        plain, echoed = await answer(prompt=prompt), await answer(prompt=prompt, echo=True)
        assert echoed == prompt + plain
        ids = await ask(http, completion([400, 500, 600], echo=True, max_tokens=0))
        assert (ids["usage"]["prompt_tokens"], ids["usage"]["completion_tokens"]) == (3, 0)
        assert (await answer(prompt=[400, 500, 600], echo=True)).startswith(text_of(ids))


@pytest.mark.parametrize("max_tokens", [0, 1, 12])
async def test_logprobs_of_an_echo(system: System, max_tokens: int) -> None:
    """Of prompt and completion alike, whole and streamed, as evaluation harnesses ask for them: each prompt's
    first has none, and what a text is generated with is what it is read with."""
    text = "Once upon a time, a 日本 😀"
    body = completion(seed=1, max_tokens=max_tokens, ignore_eos=True, echo=True, logprobs=2, n=2)
    async with system.async_http() as http, system.async_openai() as client:
        answer = await ask(http, {**body, "prompt": [text, [400, 500, 600]]})
        streamed = await hear(client, {**body, "prompt": text, "n": 1})
        again = await ask(http, {**body, "prompt": answer["choices"][0]["text"], "n": 1, "max_tokens": 0})
    assert answer["usage"]["completion_tokens"] == 4 * max_tokens
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert all(each <= 0 for each in logprobs["token_logprobs"][1:])
        assert {len(part) for part in logprobs.values()} == {len(logprobs["tokens"])}
        for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            if "\ufffd" not in token and not token.startswith("<|"):
                assert choice["text"][at : at + len(token)] == token
    first = answer["choices"][0]
    assert first["text"].startswith(text)
    assert streamed.text == first["text"]
    read = again["choices"][0]["logprobs"]
    if read["tokens"] == first["logprobs"]["tokens"]:  # or its tokenizer cuts the text elsewhere
        assert read["token_logprobs"][1:] == pytest.approx(first["logprobs"]["token_logprobs"][1:], abs=1e-3)
    elif max_tokens == 0:
        raise AssertionError("the same text")


async def test_several_prompts(system: System) -> None:
    """A list of prompts gives the choices of each, in order, and the usage of all."""
    prompts = ["Once upon a time", "Mia said", "The capital of France is"]
    body = {"seed": 3, "max_tokens": 10, "ignore_eos": True}
    async with system.async_http() as http, system.async_openai() as client:
        together = await ask(http, completion(prompts, n=2, **body))
        alone = [await ask(http, completion(prompt, n=2, **body)) for prompt in prompts]
        streamed = [""] * 6
        async for chunk in await create(client, completion(prompts, n=2, stream=True, **body)):
            for choice in chunk.choices:
                streamed[choice.index] += choice.text
    expected = [text_of(answer, index) for answer in alone for index in range(2)]
    assert [text_of(together, index) for index in range(6)] == expected == streamed
    assert together["usage"]["completion_tokens"] == 60
    assert together["usage"]["prompt_tokens"] == sum(a["usage"]["prompt_tokens"] for a in alone)


async def test_usage_in_a_stream(system: System, streams: TokenStreams) -> None:
    """`include_usage` adds one chunk without choices, last, and a null usage to all others; without it no
    chunk speaks of usage. The numbers are those of the tokens in the log."""
    body = chat(seed=1, max_tokens=12)
    async with system.async_openai() as client:
        with_usage = await create(client, {**body, "stream": True, "stream_options": {"include_usage": True}})
        *chunks, last = [chunk async for chunk in with_usage]
        without = [chunk async for chunk in await create(client, {**body, "stream": True})]
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in without)
    assert all(len(chunk.choices) == 1 for chunk in chunks + without)
    assert last.choices == []
    usage = last.usage
    assert usage.completion_tokens == len(await token_ids(streams, last.id))
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_text_parts(system: System) -> None:
    """Content as a list of text parts is the same as the text."""
    async with system.async_http() as http:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        whole, joined = await asyncio.gather(
            *(ask(http, chat(content, seed=1, max_tokens=10)) for content in ("one\ntwo", parts))
        )
    assert text_of(joined) == text_of(whole)
    assert joined["usage"] == whole["usage"]


async def test_harmless_fields_are_taken(system: System) -> None:
    """Fields of OpenAI's that ask for nothing here are accepted: null for any of them, `user`, `metadata`,
    `store: false`, and a message as an answer holds it."""
    async with system.async_http() as http:
        plain = await ask(http, chat(seed=1, max_tokens=10))
        harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "tools": None, "stop": None}
        dressed = await ask(http, chat(seed=1, max_tokens=10, n=None, **harmless))
        assert text_of(dressed) == text_of(plain)
        turn = [*chat()["messages"], plain["choices"][0]["message"], {"role": "user", "content": "And then?"}]
        assert text_of(await ask(http, {**chat(max_tokens=10, ignore_eos=True), "messages": turn}))
