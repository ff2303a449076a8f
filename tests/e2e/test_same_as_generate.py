"""Batching, queue, stream and protocol change no token: what comes out is what the model alone makes."""

import asyncio
import random
from typing import Any

import pytest

from llmboost.streams import TokenStreams
from tests.commands import ROOT
from tests.e2e.asking import (
    ask,
    bytes_of,
    chat,
    completion,
    hear,
    hear_all,
    long_story,
    text_of,
    token_ids,
    transcript,
)
from tests.e2e.reference import Asking, Reference
from tests.e2e.system import LOADING_S, System

DEMO_FOLDER = ROOT / "worker" / "llmboost_worker" / "demo_model"
WORDS = ["the", "a", "robot", "cat", "how", "many", "old", "ship", "said", "she", "it", "found", "two", "is"]


def mixed_requests() -> list[dict[str, Any]]:
    """32 greedy requests to both endpoints: prompts of 1 to 241 words, outputs of up to 26 tokens."""
    pick = random.Random(2)
    requests = []
    for number in range(32):
        words = " ".join(pick.choices(WORDS, k=1 + number**2 // 4))
        most = 4 + number * 7 % 23
        if number % 2:
            requests.append(completion(words, temperature=0, max_tokens=most))
        else:
            requests.append(chat(words, temperature=0, max_tokens=most))
    return requests


REQUESTS = mixed_requests()


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest) -> list[Reference]:
    """`generate` on the same prompts, one by one; it loads while the server does."""
    asking = Asking(DEMO_FOLDER, REQUESTS)
    request.getfixturevalue("system")
    return asking.result(within=LOADING_S)


async def test_greedy_equals_generate(
    references: list[Reference], system: System, streams: TokenStreams
) -> None:
    """32 prompts of mixed length sent at once, half of them streamed, give `generate`'s tokens in float32:
    the ids in Redis, the text in HTTP, the number of tokens in the usage."""
    async with system.async_http() as http, system.async_openai() as client:

        async def answer(body: dict[str, Any]) -> tuple[str, str]:
            if REQUESTS.index(body) % 4 < 2:
                heard = await hear(client, body)
                return heard.id, heard.text
            whole = await ask(http, body)
            assert whole["usage"]["completion_tokens"] == len(await token_ids(streams, whole["id"]))
            return whole["id"], text_of(whole)

        answers = await asyncio.gather(*map(answer, REQUESTS))
    logs = [await transcript(streams, job_id) for job_id, _ in answers]
    assert [log.prompt_tokens for log in logs] == [reference.prompt_tokens for reference in references]
    for (_, text), log, reference in zip(answers, logs, references, strict=True):
        sure = reference.sure
        assert log.choices[0].token_ids[:sure] == reference.token_ids[:sure]
        if sure == len(reference.token_ids):
            assert log.choices[0].token_ids == reference.token_ids
            assert text == reference.text
    # What was left out because rounding may decide it is next to nothing.
    assert sum(reference.sure == len(reference.token_ids) for reference in references) >= 30


async def test_logprobs_name_the_tokens_of_generate(references: list[Reference], system: System) -> None:
    """The bytes of the logprobs' tokens are the text that `generate` makes, and each token is its position's
    likeliest."""
    number = max(
        (n for n, r in enumerate(references) if r.sure == len(r.token_ids) and "messages" in REQUESTS[n]),
        key=lambda n: len(references[n].token_ids),
    )
    async with system.async_http() as http:
        whole = await ask(http, {**REQUESTS[number], "logprobs": True, "top_logprobs": 3})
    tokens = whole["choices"][0]["logprobs"]["content"]
    assert len(tokens) == len(references[number].token_ids)
    assert all(token["token"] == token["top_logprobs"][0]["token"] for token in tokens)
    ended = whole["choices"][0]["finish_reason"] == "stop"  # then the last token isn't text
    assert bytes_of(tokens[:-1] if ended else tokens).decode(errors="replace") == references[number].text


async def test_seeded_alone_equals_seeded_in_a_batch(system: System, streams: TokenStreams) -> None:
    """At temperature 1 a seeded request draws the same tokens whatever else is in the batch: alone, and among
    31 others with other prompts, lengths and parameters that come and go around it."""
    body = long_story(64, seed=11)
    others = [
        {**other, "temperature": number / 16, "top_p": 1 - number / 50, "seed": number}
        for number, other in enumerate(REQUESTS[:31], start=1)
    ]
    async with system.async_http() as http, system.async_openai() as client:
        alone = await ask(http, body)
        heard, *_ = await hear_all(client, [body, *others])
    assert await token_ids(streams, heard.id) == await token_ids(streams, alone["id"])
    assert heard.text == text_of(alone)
