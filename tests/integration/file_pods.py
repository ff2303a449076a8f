"""Pods that keep files, and what is left of these."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from arq.connections import ArqRedis
from openai import AsyncOpenAI
from openai.types import FileObject

from llmboost_api.files.files import Files

from .api_pod import RunningPod, serving, settings_for
from .storages import left_in

LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'
MIB = 1 << 20
LONG = b"x" * (3 * MIB)
"""More than is gathered before it is written."""
MAX_FILE_BYTES = 40 * MIB


@pytest.fixture
async def pods(redis: ArqRedis, redis_url: str, files_url: str) -> AsyncIterator[Iterator[RunningPod]]:
    settings = settings_for(redis_url, files_url=files_url)
    async with serving(settings) as first, serving(settings) as second:
        yield itertools.cycle((first, second))


@pytest.fixture
async def pod(redis: ArqRedis, redis_url: str, files_url: str) -> AsyncIterator[RunningPod]:
    async with serving(
        settings_for(redis_url, files_url=files_url, max_file_bytes=MAX_FILE_BYTES)
    ) as running:
        yield running


@pytest.fixture
async def local_pod(redis: ArqRedis, redis_url: str, tmp_path: Path) -> AsyncIterator[RunningPod]:
    """One for what doesn't depend on where files are kept."""
    async with serving(settings_for(redis_url, files_url=str(tmp_path))) as running:
        yield running


def files_of(pod: RunningPod) -> Files:
    files: Files = pod.server.config.app.state.pod.files  # type: ignore[union-attr]
    return files


async def upload(
    client: AsyncOpenAI, data: bytes = LINES, name: str = "input.jsonl", **fields: object
) -> FileObject:
    fields = {"purpose": "user_data", **fields}
    return await client.files.create(file=(name, data), **fields)  # type: ignore[arg-type]


async def nothing_left(redis: ArqRedis, files_url: str) -> None:
    """Neither bytes nor a record nor a reservation."""
    assert left_in(files_url) == []
    assert not [key async for key in redis.scan_iter(match="llmboost:file*")]
