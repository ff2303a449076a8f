"""The official `openai` package and curl against a real server, with `id:` lines and pings every 50 ms."""

import asyncio
import json
import shutil
import subprocess
from typing import Any

import pytest

from llmboost.frames import Cursor
from llmboost.streams import position
from tests.e2e.asking import (
    Heard,
    ask,
    chat,
    completion,
    create,
    create_sync,
    hear_all,
    long_story,
    path_of,
    text_of,
)
from tests.e2e.system import System
from tests.integration.answers import frames_of

REQUESTS = {
    "chat": chat(seed=3, max_tokens=40),
    "completions": completion(seed=3, max_tokens=40),
}
SLOW = 120
"""Tokens of a stream that lasts for many pings."""


@pytest.mark.parametrize("endpoint", REQUESTS)
def test_sync_client(system: System, endpoint: str) -> None:
    """The same seed gives the same text, finish reason and usage, streamed or not."""
    body = REQUESTS[endpoint]
    heard, usage = Heard(), None
    with system.openai() as client:
        whole = create_sync(client, body)
        for chunk in create_sync(client, {**body, "stream": True, "stream_options": {"include_usage": True}}):
            assert chunk.id == heard.id or not heard.id
            assert usage is None, "the usage comes last"
            heard.take(chunk)
            usage = chunk.usage
    assert heard.text
    assert heard.text == text_of(whole.model_dump())
    assert heard.finish_reason == whole.choices[0].finish_reason
    assert usage is not None
    details = {"prompt_tokens_details"}  # the second time, more of the prompt is cached
    assert usage.model_dump(exclude=details) == whole.usage.model_dump(exclude=details)


@pytest.mark.parametrize("endpoint", REQUESTS)
async def test_async_client(system: System, endpoint: str) -> None:
    """As with the sync client."""
    body = REQUESTS[endpoint]
    async with system.async_openai() as client:
        whole, (heard,) = await asyncio.gather(create(client, body), hear_all(client, [body]))
    assert heard.text
    assert (heard.text, heard.finish_reason) == (
        text_of(whole.model_dump()),
        whole.choices[0].finish_reason,
    )


async def test_slow_streams_with_pings(system: System) -> None:
    """Pings between the frames of many slow streams raise nothing in the client and change no text."""
    bodies: list[dict[str, Any]] = [
        *(long_story(SLOW, seed=seed) for seed in range(4)),
        *(completion(max_tokens=SLOW, ignore_eos=True, seed=seed) for seed in range(4)),
    ]
    async with system.async_openai() as client, system.async_http() as http:
        heard = await hear_all(client, bodies)
        whole = await asyncio.gather(*(ask(http, body) for body in bodies))
    assert [stream.text for stream in heard] == [text_of(answer) for answer in whole]
    assert {stream.finish_reason for stream in heard} == {"length"}


def place_of(frame_id: str | None) -> tuple[int, int, float]:
    """Where in its stream a frame is: the last of an entry has read all of it."""
    cursor = Cursor.parse(frame_id or "")
    assert cursor is not None, frame_id
    return (*position(cursor.entry_id), cursor.frames or float("inf"))


async def test_pings_and_ids_are_on(system: System) -> None:
    """What the other tests count on: pings come while tokens flow, each ends in a single newline, and every
    frame of the stream has its own, growing id."""
    body = {**long_story(SLOW, seed=1), "stream": True}
    async with system.async_http() as http:
        response = await http.post(path_of(body), json=body)
    frames = frames_of(response.text)  # knows pings with a single newline only
    before_the_end = response.text[: response.text.rindex("data: {")]
    assert before_the_end.count(": ping\n") >= 3
    places = [place_of(frame.id) for frame in frames]
    assert len(places) >= 10  # a busy server sends several tokens in one
    assert places == sorted(set(places))
    assert frames[-1].data == "[DONE]"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("stream", [False, True])
async def test_curl(system: System, stream: bool) -> None:
    """curl gets the same text; the first chunk of the stream names the role, the last has an empty delta."""
    body = {**chat(seed=3, max_tokens=40), "stream": stream}
    command = ["curl", "-sSN", "--fail-with-body", f"{system.url}{path_of(body)}"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    run = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    async with system.async_http() as http:
        expected = await ask(http, {**body, "stream": False})
    if not stream:
        assert text_of(json.loads(run.stdout)) == text_of(expected)
        return
    *frames, done = frames_of(run.stdout)
    assert done.data == "[DONE]"
    deltas = [frame.json["choices"][0]["delta"] for frame in frames]
    assert deltas[0]["role"] == "assistant"
    assert deltas[-1] == {"content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == text_of(expected)
