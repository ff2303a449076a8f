"""A worker of each kind on one queue: whoever is killed, the other continues its streams."""

import signal
from typing import Any

import pytest
from openai import AsyncOpenAI

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.commands import Command
from tests.e2e.asking import Heard, attempts, create, hear, long_story, transcript
from tests.e2e.system import LOADING_S, System
from tests.waiting import wait_until

FLAGS = ("--dtype", "float32", "--threads", "1", "--lease", "1", "--kv-cache-memory", "0.25")
VLLM = ("--engine", "vllm", "--vllm-options", '{"enforce_eager": true}')
TOKENS = 1000
"""Takes seconds, and the first of them are heard while the others are made."""
SAMPLINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1, "seed": 7, "top_p": 0.95, "frequency_penalty": 0.5},
}


async def frozen_midway(
    client: AsyncOpenAI, streams: TokenStreams, worker: Command
) -> dict[str, tuple[Heard, Any]]:
    """Streams that the worker has begun and, stopped, can't end: what was heard of each, and its rest."""
    while True:
        begun = {}
        for name, sampling in SAMPLINGS.items():
            request = long_story(TOKENS, **sampling)
            begun[name] = Heard(), await create(client, {**request, "stream": True})
        for heard, reply in begun.values():
            async for chunk in reply:
                heard.take(chunk)
                if len(heard.pieces) >= 10:
                    break
        worker.signal(signal.SIGSTOP)
        logs = [await transcript(streams, heard.id) for heard, _ in begun.values()]
        if not any(log.terminal for log in logs):
            return begun
        worker.signal(signal.SIGCONT)  # it was quicker than we are: there is nothing left to continue
        for _, reply in begun.values():
            await reply.close()


async def continued(system: System, streams: TokenStreams, victim: str, heir: str, *flags: str) -> None:
    """Streams begin on the only worker there is, which is killed and leaves no process; when another has
    come, it goes on with them. What was heard is what that one says of the same requests by itself."""
    async with system.async_openai() as client:
        command = system.parts.pop(victim)
        begun = await frozen_midway(client, streams, command)
        command.signal(signal.SIGKILL)
        await wait_until(lambda: not command.family(), within=30)
        system.start_worker(*FLAGS, *flags, name=heir)
        for heard, reply in begun.values():
            async for chunk in reply:
                heard.take(chunk)
        unbroken = {
            name: await hear(client, long_story(TOKENS, **sampling)) for name, sampling in SAMPLINGS.items()
        }
    for name, (heard, _) in begun.items():
        assert heard.finish_reason == "length"
        assert heard.text == unbroken[name].text
        first, second = await attempts(streams, heard.id)
        assert first != second
        assert await attempts(streams, unbroken[name].id) == [second]
        assert (await transcript(streams, heard.id)).completion_tokens == TOKENS


@pytest.mark.timeout(4 * LOADING_S)
async def test_a_stream_goes_on_on_the_other_engine_and_back() -> None:
    """Token for token, greedy and sampled: in the same precision both engines draw the same."""
    with System() as system:
        system.start_pod("--ping-interval", "1")
        system.start_worker(*FLAGS, name="first")
        system.await_worker("first")
        redis = connect(system.redis_url)
        streams = TokenStreams(redis, retention=600)
        await continued(system, streams, "first", "vllm", *VLLM)
        await continued(system, streams, "vllm", "last")
        await redis.aclose()
