"""Files, by the official client: two pods that share a storage, asked in turn."""

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import httpx
import pytest
from arq.connections import ArqRedis
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types import FileObject

from llmboost import keys
from llmboost_api.files.files import Files

from .api_pod import RunningPod, serving, settings_for
from .storages import files_url, left_in, s3_endpoint

__all__ = ["files_url", "s3_endpoint"]

LINES = b'{"custom_id": "1"}\n{"custom_id": "2"}\n'
MIB = 1 << 20


@pytest.fixture
async def pods(redis: ArqRedis, redis_url: str, files_url: str) -> AsyncIterator[Iterator[RunningPod]]:
    async with AsyncExitStack() as stack:
        settings = settings_for(redis_url, files_url=files_url, max_file_bytes=40 * MIB)
        both = [await stack.enter_async_context(serving(settings)) for _ in range(2)]
        yield itertools.cycle(both)


@pytest.fixture
async def pod(pods: Iterator[RunningPod]) -> RunningPod:
    return next(pods)


def files_of(pod: RunningPod) -> Files:
    files: Files = pod.server.config.app.state.pod.files  # type: ignore[union-attr]
    return files


async def upload(
    client: AsyncOpenAI, data: bytes = LINES, name: str = "input.jsonl", **fields: object
) -> FileObject:
    fields = {"purpose": "user_data", **fields}
    return await client.files.create(file=(name, data), **fields)  # type: ignore[arg-type]


async def test_the_life_of_a_file(pods: Iterator[RunningPod], files_url: str) -> None:
    made = await upload(next(pods).openai)
    assert made.object == "file"
    assert made.id.startswith("file-")
    assert (made.bytes, made.filename, made.purpose) == (len(LINES), "input.jsonl", "user_data")
    assert (made.status, made.status_details, made.expires_at) == ("processed", None, None)
    for _ in range(2):
        assert await next(pods).openai.files.retrieve(made.id) == made
        content = await next(pods).openai.files.content(made.id)
        assert content.content == LINES
        assert content.response.headers["content-type"] == "application/octet-stream"
        assert content.response.headers["content-length"] == str(len(LINES))
        assert content.response.headers["content-disposition"] == 'attachment; filename="input.jsonl"'
    assert (await next(pods).openai.files.list()).data == [made]
    deleted = await next(pods).openai.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    for call in ("retrieve", "content", "delete"):
        with pytest.raises(NotFoundError, match=made.id):
            await getattr(next(pods).openai.files, call)(made.id)
    assert (await next(pods).openai.files.list()).data == []
    assert left_in(files_url) == []


@pytest.mark.parametrize("size", [0, 1, 33 * MIB + 1])
async def test_files_of_any_size(pods: Iterator[RunningPod], size: int) -> None:
    data = os.urandom(size)
    made = await upload(next(pods).openai, data)
    assert made.bytes == size
    assert (await next(pods).openai.files.content(made.id)).content == data
    await next(pods).openai.files.delete(made.id)
