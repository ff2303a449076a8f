"""Text arrives in whole characters, and never a part of what ends it."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.asking import ask, bytes_of, chat, completion, hear, hear_all, long_story, text_of
from tests.e2e.script_model import TEMPLATE_ERROR, TEXTS, prompt_for, save_script_model
from tests.e2e.system import ONE_THREAD, System

SCRIPT = "script"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def script(system: System, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """The shared system with one more worker, whose model says what a test knows by heart."""
    folder = save_script_model(tmp_path_factory.mktemp("model") / "script")
    system.start_worker(str(folder), "--served-model-name", SCRIPT, *ONE_THREAD, name="script")
    system.await_worker("script")
    yield system
    system.stop("script")


def says(number: int, **fields: Any) -> dict[str, Any]:
    """A request that is answered by `TEXTS[number]`."""
    return completion(prompt_for(number), **{"model": SCRIPT, "max_tokens": 200, "temperature": 0, **fields})


async def test_characters_arrive_whole(script: System) -> None:
    """Emoji of several code points, CJK and combining marks, made of tokens that are parts of characters:
    no chunk holds a replacement character or half of anything, and together they are the text."""
    numbers = [number for number in range(len(TEXTS)) for _ in range(4)]
    async with script.async_openai() as client, script.async_http() as http:
        heard = await hear_all(client, [says(number) for number in numbers])
        whole = await asyncio.gather(*(ask(http, says(number)) for number in range(len(TEXTS))))
    assert [text_of(answer) for answer in whole] == list(TEXTS)
    for number, stream in zip(numbers, heard, strict=True):
        assert stream.text == TEXTS[number]
        assert stream.finish_reason == "stop"
        assert len(stream.pieces) > 10
        assert not any(REPLACEMENT in piece for piece in stream.pieces)


@pytest.mark.parametrize("stop", ["🚀👨", "👨‍👩", "\u200d👦", "🏳️", "🇷", "🇵🇧", "\N{VARIATION SELECTOR-16}"])
async def test_stops_inside_of_multibyte_text(script: System, stop: str) -> None:
    """A stop string is a string: it is found across tokens and inside of what looks like one character,
    and what is before it arrives to the last character, no more."""
    async with script.async_openai() as client:
        heard = await hear(client, says(0, stop=stop))
    assert (heard.text, heard.finish_reason) == (TEXTS[0].partition(stop)[0], "stop")


@pytest.mark.parametrize("tokens", [1, 2, 3, 11, 12, 13, 14, 15, 16])
async def test_cut_inside_of_a_character(script: System, tokens: int) -> None:
    """An answer that ends in the middle of a character ends as any decoder would say it: streamed and whole
    agree, and are what the tokens' bytes are."""
    body = says(1, max_tokens=tokens)
    async with script.async_openai() as client, script.async_http() as http:
        heard, whole = await asyncio.gather(hear(client, body), ask(http, {**body, "logprobs": 1}))
    assert heard.text == text_of(whole)
    assert heard.text.rstrip(REPLACEMENT) == TEXTS[1][: len(heard.text.rstrip(REPLACEMENT))]
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == tokens


async def test_random_bytes_are_decoded_as_one(system: System) -> None:
    """Even of tokens drawn at random, many of them no valid text, the stream's chunks make exactly what all
    of their bytes together decode to."""
    async with system.async_http() as http, system.async_openai() as client:
        bodies = [
            chat(max_tokens=60, temperature=2, seed=seed, logprobs=True, ignore_eos=True) for seed in range(6)
        ]
        whole = await asyncio.gather(*(ask(http, body) for body in bodies))
        heard = await hear_all(client, bodies)
    for answer, stream in zip(whole, heard, strict=True):
        tokens = answer["choices"][0]["logprobs"]["content"]
        # Special tokens, which may be drawn here, are no text.
        spoken = [token for token in tokens if not token["token"].startswith("<|")]
        assert stream.text == text_of(answer) == bytes_of(spoken).decode(errors="replace")


TOKENS = 120


def cuts(text: str) -> list[list[str]]:
    """Stop strings from all over a text, short and long, alone and several together, and some that only
    nearly occur."""
    found = [[text[-4:] + "\0"], [text[5:25] + "\0", text[60:70] + "\0"]]
    found += [[text[at : at + length]] for at in range(3, len(text) - 20, 43) for length in (1, 2, 5, 13)]
    found += [[text[at : at + 9], text[at - 3 : at + 2] + "\0"] for at in range(40, len(text) - 20, 61)]
    found += [[text[at : at + 8], text[at + 2 : at + 4], text[at + 4 : at + 20]] for at in (30, 90, 150)]
    return [stops for stops in found if all(stops)]


def ends_before(text: str, stops: list[str]) -> tuple[str, str]:
    """What a client may see of a text, and the finish reason: the stop that is complete first ends it, of two
    complete at once the longer."""
    ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not ends:
        return text, "length"
    end, length = min(ends)
    return text[: end + length], "stop"


async def test_no_part_of_a_stop_string_is_seen(system: System) -> None:
    """Of many stop strings over one seeded story, each ends the stream exactly where it begins; what only
    began like one is all there."""
    async with system.async_http() as http, system.async_openai() as client:
        story = text_of(await ask(http, long_story(TOKENS, seed=5)))
        stops = cuts(story)
        heard = await hear_all(client, [long_story(TOKENS, seed=5, stop=each) for each in stops])
    assert len(stops) > 20
    expected = [ends_before(story, each) for each in stops]
    assert [(stream.text, stream.finish_reason) for stream in heard] == expected
    assert {reason for _, reason in expected} == {"stop", "length"}


async def test_stop_string_on_request(system: System) -> None:
    """With `include_stop_str_in_output` the text goes on to the end of the stop string, and not beyond."""
    async with system.async_http() as http:
        story = text_of(await ask(http, long_story(40, seed=5)))
        stop = story[30:36]
        answer = await ask(http, long_story(40, seed=5, stop=stop, include_stop_str_in_output=True))
    assert text_of(answer) == story[: story.find(stop) + len(stop)]


async def test_template_that_raises(script: System) -> None:
    """A chat template's own error reaches the client as a 400 with the template's words, streamed or not,
    and the worker goes on."""
    async with script.async_http() as http:
        for stream in (False, True):
            refused = await http.post(
                "/v1/chat/completions", json={**chat("hello"), "model": SCRIPT, "stream": stream}
            )
            assert refused.status_code == 400
            error = refused.json()["error"]
            assert TEMPLATE_ERROR in error["message"]
            assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
        assert text_of(await ask(http, says(1))) == TEXTS[1]
