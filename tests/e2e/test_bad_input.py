"""Bad input gets an error in OpenAI's form that says what is wrong, and harms nobody else."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.asking import (
    CHAT,
    COMPLETIONS,
    Heard,
    ask,
    chat,
    completion,
    create,
    hear,
    long_story,
    path_of,
    text_of,
)
from tests.e2e.system import System

CONTEXT = 2048


@dataclass
class Bad:
    """A request that is refused, and what the refusal says."""

    body: Any
    """An object, or the bytes themselves."""
    says: tuple[str, ...]
    """Parts of the message."""
    param: str | None = None
    status: int = 400
    method: str = "POST"
    path: str = CHAT

    async def send(self, http: httpx.AsyncClient) -> httpx.Response:
        content = self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()
        return await http.request(
            self.method, self.path, content=content, headers={"content-type": "application/json"}
        )


def raw(text: str) -> bytes:
    """A chat request with this as the user's message, spelled as JSON by the test itself."""
    head = b'{"model": "llmboost-demo", "messages": [{"role": "user", "content": '
    return head + text.encode("latin-1") + b"}]}"


def with_field(text: str) -> bytes:
    """A chat request with one more field, spelled by the test itself."""
    return json.dumps(chat("hi")).encode()[:-1] + b", " + text.encode() + b"}"


def asks(body: dict[str, Any], *says: str, param: str | None = None, status: int = 400) -> Bad:
    return Bad(body, says, param, status, path=path_of(body))


LONG = "word " * 3000

BAD: dict[str, Bad] = {
    # not JSON
    "empty body": Bad(b"", ("empty",)),
    "not JSON": Bad(b"hello", ("JSON",)),
    "cut off": Bad(json.dumps(chat()).encode()[:-9], ("JSON",)),
    "trailing comma": Bad(b'{"model": "llmboost-demo",}', ("JSON",)),
    "not an object": Bad(b"[1, 2]", ("object",)),
    "a string": Bad(b'"hello"', ("object",)),
    "NaN": Bad(with_field('"temperature": NaN'), ("NaN",)),
    "infinity": Bad(with_field('"temperature": Infinity'), ("Infinity",)),
    "minus infinity": Bad(with_field('"top_p": -Infinity'), ("-Infinity",)),
    "number of infinite size": Bad(with_field('"temperature": 1e999'), ("out of range",)),
    "invalid UTF-8": Bad(raw('"\xff\xfe"'), ("UTF-8",)),
    "cut UTF-8": Bad(raw('"\xe2\x82"'), ("UTF-8",)),
    "UTF-16": Bad(json.dumps(chat()).encode("utf-16"), ("UTF-8",)),
    "lone high surrogate": Bad(raw('"\\ud800"'), ("surrogate", "\\ud800")),
    "lone low surrogate": Bad(raw('"x\\udfffy"'), ("surrogate", "\\udfff")),
    "surrogates the wrong way round": Bad(raw('"\\udc00\\ud800"'), ("surrogate",)),
    "surrogate in UTF-8": Bad(raw('"\xed\xa0\x80"'), ("UTF-8",)),
    "surrogate in a key": Bad(with_field('"\\ud800": 1'), ("surrogate",)),
    "deep nesting": Bad(with_field('"metadata": ' + "[" * 100_000 + "]" * 100_000), ("nested",)),
    "deep objects": Bad(with_field('"metadata": ' + '{"a":' * 50_000 + "1" + "}" * 50_000), ("nested",)),
    "10 MB": Bad(chat("x" * 10_000_000), ("8388608",), status=413),
    # numbers
    "10 to the 400": Bad(with_field(f'"max_tokens": {10**400}'), ("at most 2147483647",), "max_tokens"),
    "10 to the 400 as a float": Bad(with_field(f'"temperature": {10**400}'), ("number",), "temperature"),
    "10 to the 5000": Bad(with_field(f'"seed": {"1" + "0" * 5000}'), ("number",)),
    "seed of 65 bits": asks(chat(seed=2**64), "seed", param="seed"),
    "negative max_tokens": asks(chat(max_tokens=-1), "max_tokens", "-1", "at least 1", param="max_tokens"),
    "max_tokens 0": asks(chat(max_tokens=0), "at least 1", param="max_tokens"),
    "max_tokens of 33 bits": asks(chat(max_tokens=2**32), "max_tokens", param="max_tokens"),
    "negative completion tokens": asks(
        completion(max_tokens=-5), "max_tokens", "-5", param="max_tokens"
    ),
    "temperature too high": asks(chat(temperature=2.5), "2.5", "at most 2", param="temperature"),
    "top_p 0": asks(chat(top_p=0), "more than 0", param="top_p"),
    "n 0": asks(chat(n=0), "at least 1", param="n"),
    "n too high": asks(chat(n=1000), "at most 128", param="n"),
    "top_logprobs without logprobs": asks(chat(top_logprobs=2), "logprobs", param="top_logprobs"),
    "min_tokens above max_tokens": asks(chat(min_tokens=9, max_tokens=3), "9", "3", param="min_tokens"),
    "bias of no token": asks(chat(logit_bias={"x": 1}), "token", param="logit_bias"),
    "bias too strong": asks(chat(logit_bias={"5": 1000}), "-100 to 100", param="logit_bias"),
    # types
    "messages a string": asks(chat() | {"messages": "hi"}, "a list", param="messages"),
    "message a string": asks(chat() | {"messages": ["hi"]}, "an object", param="messages[0]"),
    "content a number": asks(chat(5), "string", param="messages[0].content"),
    "content an image": asks(
        chat([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]),
        "image_url",
        param="messages[0].content",
    ),
    "max_tokens a string": asks(chat(max_tokens="5"), "an integer", param="max_tokens"),
    "max_tokens a fraction": asks(chat(max_tokens=5.5), "integer", param="max_tokens"),
    "temperature a boolean": asks(chat(temperature=True), "a number", param="temperature"),
    "stream a string": asks(chat(stream="yes"), "true or false", param="stream"),
    "stop a number": asks(chat(stop=5), "string", param="stop"),
    "stop empty": asks(chat(stop=[""]), "empty string", param="stop"),
    "model a number": asks(chat() | {"model": 5}, "a string", param="model"),
    "no model": asks({"messages": chat()["messages"]}, "missing", param="model"),
    "no messages": Bad({"model": "llmboost-demo"}, ("missing",), "messages"),
    "empty messages": asks(chat() | {"messages": []}, "empty", param="messages"),
    "message without content": asks(
        chat() | {"messages": [{"role": "user"}]}, "missing", param="messages[0].content"
    ),
    "unknown role": asks(
        chat() | {"messages": [{"role": "wizard", "content": "hi"}]}, "wizard", param="messages[0].role"
    ),
    "prompt an object": asks(completion({}), "list of strings", param="prompt"),
    "prompt an empty list": asks(completion([]), "empty list", param="prompt"),
    "prompt empty": asks(completion(""), "at least one token", param="prompt"),
    "prompt of mixed kinds": asks(completion([1, "a"]), "token id", param="prompt"),
    "token outside of the vocabulary": asks(completion([1_000_000]), "1000000", "2047", param="prompt"),
    "negative token": asks(completion([-1]), "-1", param="prompt"),
    # what the model can't do
    "unknown model": asks(chat() | {"model": "gpt-x"}, "gpt-x", "llmboost-demo", param="model", status=404),
    "unknown model, streamed": asks(
        chat(stream=True) | {"model": "gpt-x"}, "gpt-x", param="model", status=404
    ),
    "name with marks": asks(chat() | {"model": "a:b{c}\n*"}, "does not exist", param="model", status=404),
    "template refuses the role": asks(
        chat() | {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]},
        "template",
        "tool",
        param="messages",
    ),
    "prompt over the context": asks(chat(LONG), f"{CONTEXT}", "tokens in the messages", param="messages"),
    "prompt over the context, streamed": asks(
        chat(LONG, stream=True), f"{CONTEXT}", "tokens in the messages", param="messages"
    ),
    "text over the context": asks(completion(LONG), f"{CONTEXT}", "tokens in the prompt", param="prompt"),
    "prompt of 7 MB": asks(chat("word " * 1_400_000), f"{CONTEXT}", "tokens in", param="messages"),
    "one word of 7 MB": asks(chat("x" * 7_000_000), f"{CONTEXT}", "tokens in", param="messages"),
    "prompt and output over the context": asks(
        chat("hi", max_tokens=CONTEXT), f"{CONTEXT}", "for the completion", param="messages"
    ),
    # fields
    "unknown field": asks(chat(colour="red"), "colour", param="colour"),
    "misspelt field": asks(chat(temprature=1), "Did you mean 'temperature'", param="temprature"),
    "unknown field of a message": asks(
        chat() | {"messages": [{"role": "user", "content": "hi", "mood": 1}]},
        "mood",
        param="messages[0].mood",
    ),
    "functions": asks(chat(functions=[{"name": "f"}]), "not supported", param="functions"),
    "tools": asks(chat(tools=[{"type": "function"}]), "not supported", param="tools"),
    "response_format": asks(
        chat(response_format={"type": "xml"}), "json_schema", param="response_format.type"
    ),
    "a schema that can't be enforced": asks(
        chat(guided_json={"type": "array", "uniqueItems": True}), "uniqueItems", param="guided_json"
    ),
    "a pattern that is none": asks(completion(guided_regex="(a"), "unclosed group", param="guided_regex"),
    "stored": asks(completion(store=True), "not supported", param="store"),
    "suffix": asks(completion(suffix="end"), "not supported", param="suffix"),
    "best_of": asks(completion(best_of=3), "3", param="best_of"),
    "stream_options without a stream": asks(
        chat(stream_options={"include_usage": True}), "stream", param="stream_options"
    ),
    # the wrong door
    "GET": Bad(b"", ("POST",), status=405, method="GET", path=COMPLETIONS),
    "PUT": Bad(chat(), ("POST",), status=405, method="PUT"),
    "DELETE": Bad(b"", ("POST",), status=405, method="DELETE"),
    "unknown path": Bad(chat(), ("/v1/chat",), status=404, path="/v1/chat"),
    "POST to a completion": Bad(b"", ("/v1/completions/x", "GET"), status=405, path=COMPLETIONS + "/x"),
    "unknown path below": Bad(b"", (CHAT + "/x/y",), status=404, method="GET", path=CHAT + "/x/y"),
    "trailing slash": Bad(completion(), (COMPLETIONS,), status=404, path=COMPLETIONS + "/"),
    "path upwards": Bad(b"", ("nothing",), status=404, method="GET", path="/v1/../../etc/passwd"),
}  # fmt: skip


def assert_refused(response: httpx.Response, bad: Bad) -> None:
    """The status, and OpenAI's error object with all of its fields."""
    assert response.status_code == bad.status, response.text
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    for part in bad.says:
        assert part in error["message"]
    assert error["param"] == bad.param
    assert len(error["message"]) < 1000, "an error does not repeat the request"


@pytest.mark.parametrize("name", BAD)
async def test_refused(system: System, name: str) -> None:
    """Each with its status, the reason in words, and the field that is meant."""
    async with system.async_http() as http:
        assert_refused(await BAD[name].send(http), BAD[name])


async def test_context_error_says_both_lengths(system: System) -> None:
    """A prompt over the context length is a 400 with the length that is allowed and the prompt's own, and the
    official client raises it before the first chunk of a stream."""
    async with system.async_openai() as client, system.async_http() as http:
        tokens = (await ask(http, chat("word " * 100, max_tokens=1)))["usage"]["prompt_tokens"]
        few = (await ask(http, chat("word " * 99, max_tokens=1)))["usage"]["prompt_tokens"]
        length = tokens + 2900 * (tokens - few)
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=rf"{CONTEXT} tokens.*{length} tokens") as caught:
                await create(client, chat("word " * 3000, stream=stream))
            assert caught.value.code == "context_length_exceeded"


async def test_bad_input_harms_nobody(system: System) -> None:
    """While all of the bad requests come in at once, twice over, a running stream goes on undisturbed and
    equals what it is without them; afterwards no sequence is left in the engine and the server answers as
    before."""
    body = long_story(250, seed=8)
    async with system.async_openai() as client, system.async_http() as http:
        expected = await hear(client, body)
        before = await ask(http, chat(seed=1, max_tokens=10))
        heard = Heard()
        storm: asyncio.Future[list[httpx.Response]] | None = None
        async for chunk in await create(client, {**body, "stream": True}):
            heard.take(chunk)
            if storm is None and heard.pieces:
                storm = asyncio.gather(*(bad.send(http) for bad in list(BAD.values()) * 2))
        assert storm is not None
        answers = await storm
        after = await ask(http, chat(seed=1, max_tokens=10))
    assert (heard.text, heard.finish_reason) == (expected.text, "length")
    assert [answer.status_code for answer in answers] == [bad.status for bad in BAD.values()] * 2
    assert text_of(after) == text_of(before)
    system.await_idle()
