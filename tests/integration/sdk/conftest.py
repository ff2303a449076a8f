"""The SDK on a running system whose worker plays a script."""

import asyncio
import threading
from collections.abc import Iterator

import pytest
from arq.connections import ArqRedis

from llmboost import LLMBoost
from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.commands import wait_until
from tests.integration.api_pod import MODEL, ScriptedWorker, working


@pytest.fixture
def worker(redis: ArqRedis, redis_url: str) -> Iterator[ScriptedWorker]:
    """A worker in a thread, for the SDK's calls block this one."""
    ready, stop = threading.Event(), threading.Event()
    made: list[ScriptedWorker] = []

    async def work() -> None:
        own = connect(redis_url)
        async with working(own, TokenStreams(own, retention=60)) as scripted:
            made.append(scripted)
            ready.set()
            await asyncio.to_thread(stop.wait)
        await own.aclose()

    thread = threading.Thread(target=asyncio.run, args=(work(),))
    thread.start()
    assert ready.wait(10)
    yield made[0]
    wait_until(lambda: made[0].finished == len(made[0].jobs))
    stop.set()
    thread.join(10)


@pytest.fixture
def llm(worker: ScriptedWorker, redis_url: str) -> Iterator[LLMBoost]:
    with LLMBoost(MODEL, redis_url=redis_url, streaming=True) as running:
        yield running
