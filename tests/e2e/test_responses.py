"""The Responses API on real processes, which may be killed at any time."""

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.e2e.asking import attempts, transcript
from tests.e2e.system import MODEL, ONE_THREAD, System

TOKENS = 200
QUICK = ("--lease", "1")
"""What was claimed by a worker that is killed is soon another's."""


@pytest.fixture
def pair() -> Iterator[System]:
    """Two pods and one worker."""
    with System() as running:
        running.start_worker(*ONE_THREAD, *QUICK)
        for _ in range(2):
            running.start_pod()
        running.await_worker("worker")
        yield running


def kill(system: System, name: str) -> None:
    """Without a chance to say goodbye."""
    command = system.parts.pop(name)
    command.signal(signal.SIGKILL)
    command.wait()


def story(**fields: Any) -> dict[str, Any]:
    extra = {"seed": 7, "ignore_eos": True}
    return {
        "model": MODEL,
        "input": "Tell me a story about a cat.",
        "max_output_tokens": TOKENS,
        "extra_body": extra,
        **fields,
    }


async def all_events(client: AsyncOpenAI, response_id: str, **fields: Any) -> list[dict[str, Any]]:
    stream = await client.responses.retrieve(response_id, stream=True, **fields)
    return [event.to_dict() async for event in stream]


async def test_in_the_background_it_outlives_its_pod_and_its_worker(pair: System) -> None:
    """Streamed from pod A, which is killed in mid-stream, and the worker with it: from pod B comes the rest,
    behind the last event that came. It is exactly what a reader got who never lost his connection, and what
    another run of the same request says that nothing happened to."""
    had: list[dict[str, Any]] = []
    async with pair.async_openai(0) as a, pair.async_openai(1) as b:
        calm = await b.responses.create(**story())
        stream = await a.responses.create(**story(background=True, stream=True))
        unbroken: asyncio.Task[list[dict[str, Any]]] | None = None
        async for event in stream:
            had.append(event.to_dict())
            if unbroken is None:
                unbroken = asyncio.create_task(all_events(b, had[0]["response"]["id"]))
            if len(had) == 40:
                break
        response_id = had[0]["response"]["id"]
        kill(pair, "pod-0")
        kill(pair, "worker")
        now = await b.responses.retrieve(response_id)
        assert now.status == "in_progress"
        assert calm.output_text.startswith(now.output_text)
        pair.start_worker(*ONE_THREAD, *QUICK, name="heir")
        pair.await_worker("heir")
        rest = await all_events(b, response_id, starting_after=had[-1]["sequence_number"])
        assert unbroken is not None
        assert had + rest == await unbroken == await all_events(b, response_id)
        final = await b.responses.retrieve(response_id)
    assert [event["sequence_number"] for event in had + rest] == list(range(len(had + rest)))
    assert (had + rest)[-1]["response"] == final.to_dict()
    assert (final.status, final.output_text) == (calm.status, calm.output_text)
    redis = connect(pair.redis_url)
    streams = TokenStreams(redis, retention=600)
    assert len(set(await attempts(streams, response_id))) == 2
    assert (await transcript(streams, response_id)).completion_tokens == TOKENS
    await redis.aclose()


async def test_a_conversation_at_alternating_pods(pair: System) -> None:
    """Each turn at the other pod, with the official client: the model is shown all that was said."""
    async with pair.async_openai(0) as a, pair.async_openai(1) as b:
        previous, lengths = None, []
        for number, said in enumerate(("Hello.", "Tell me a story.", "Thank you.")):
            here, there = (a, b) if number % 2 else (b, a)
            turn = await here.responses.create(
                model=MODEL, input=said, max_output_tokens=20, previous_response_id=previous
            )
            assert await there.responses.retrieve(turn.id) == turn
            previous = turn.id
            lengths.append(turn.usage.input_tokens)
        assert lengths == sorted(set(lengths))
        assert len((await a.responses.input_items.list(previous)).data) == 1
        await b.responses.delete(previous)


async def test_cancelled_from_another_pod(pair: System) -> None:
    """It stops within a few tokens, its slot is free, and its reader's stream ends."""
    async with pair.async_openai(0) as a, pair.async_openai(1) as b:
        long = story(max_output_tokens=1900, stream=True)
        events = []
        async for event in await a.responses.create(**long):
            events.append(event)
            if len(events) == 20:
                cancelled = await b.responses.cancel(events[0].response.id)
    assert events[-1].type == "response.cancelled"
    assert cancelled.status == "cancelled"
    assert len(events) < 200
    pair.await_idle()
