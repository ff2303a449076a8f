"""Requests that may wait, and requests that may not, on one worker with few slots."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.e2e.asking import attempts, hear, long_story, token_ids
from tests.e2e.system import System, serving
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def narrow() -> Iterator[System]:
    """Its worker has three slots."""
    with serving("--max-num-seqs", "3") as running:
        yield running


@pytest.fixture
async def narrow_streams(narrow: System) -> AsyncIterator[TokenStreams]:
    redis = connect(narrow.redis_url)
    yield TokenStreams(redis, retention=600)
    await redis.aclose()


async def test_flex_requests_give_way_and_come_out_as_if_alone(
    narrow: System, narrow_streams: TokenStreams
) -> None:
    """Every slot is taken by flex requests and more of them wait. Others come meanwhile, and are answered at
    once; and then each stream is token for token what it was on a worker that had nothing else to do."""
    flex = [long_story(200, seed=number, service_tier="flex") for number in range(9)]
    others = [long_story(5, seed=number) for number in range(6)]
    async with narrow.async_openai() as client:
        alone = await asyncio.gather(*(hear(client, body) for body in flex))
        await wait_until(
            lambda: narrow.busy() == 0, every=0.05
        )  # what it says is as old as its last heartbeat
        batch = asyncio.gather(*(hear(client, body) for body in flex))
        await wait_until(lambda: narrow.busy() == 3, every=0.05)
        answered = []
        for body in others:
            answered.append(await hear(client, body))
            assert not batch.done()
        heard = await batch
    assert [stream.finish_reason for stream in answered] == ["length"] * len(others)
    assert [stream.text for stream in heard] == [stream.text for stream in alone]
    for stream, before in zip(heard, alone, strict=True):
        assert await token_ids(narrow_streams, stream.id) == await token_ids(narrow_streams, before.id)
    attempted = [len(await attempts(narrow_streams, stream.id)) for stream in heard]
    [worker] = narrow.workers()
    assert sum(attempted) > len(flex)
    assert worker["evictions"] > 0
