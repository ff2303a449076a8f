"""Uploads to a pod that is a process of its own: what they cost it, and what is left when it is killed."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from arq.connections import ArqRedis

from llmboost import keys
from tests.commands import Command, llmboost
from tests.waiting import wait_until

from .api_pod import serving, settings_for
from .forms import CONTENT_TYPE, FILE, PURPOSE, form
from .storages import S3_ENVIRONMENT, files_url, left_in, s3_endpoint

__all__ = ["files_url", "s3_endpoint"]

MIB = 1 << 20
SMALL_MIB, LARGE_MIB, GROWTH_MIB = 10, 100, 16


@pytest.fixture
def pod(redis_url: str, files_url: str) -> Iterator[Command]:
    with llmboost("api", "--port", "0", "--redis-url", redis_url, "--files-url", files_url) as command:
        yield command


@pytest.fixture
async def client(redis: ArqRedis, pod: Command) -> AsyncIterator[httpx.AsyncClient]:
    line = await asyncio.to_thread(pod.wait_for_line, "ready: serving on", among="err")
    async with httpx.AsyncClient(base_url=line.rpartition(" ")[2], timeout=60) as client:
        yield client


async def upload(client: httpx.AsyncClient, mib: int, after: asyncio.Event | None = None) -> httpx.Response:
    """A file of that size, made as it goes; its end waits for `after`."""

    async def pieces() -> AsyncIterator[bytes]:
        head, tail = form(PURPOSE, (FILE[0], b"|")).split(b"|")
        yield head
        for _ in range(mib):
            yield PIECE
        if after is not None:
            await after.wait()
        yield tail

    return await client.post("/v1/files", content=pieces(), headers={"content-type": CONTENT_TYPE})


PIECE = os.urandom(MIB)


def peak_mib(command: Command) -> float:
    """The most memory that the process has held so far."""
    status = Path(f"/proc/{command.process.pid}/status").read_text()
    match = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert match
    return int(match[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
async def test_a_large_file_is_never_whole_in_memory(
    pod: Command, client: httpx.AsyncClient, files_url: str
) -> None:
    """Nor is it on its way back."""
    await upload(client, SMALL_MIB)
    before = peak_mib(pod)
    made = (await upload(client, LARGE_MIB)).json()
    assert made["bytes"] == LARGE_MIB * MIB
    size = 0
    async with client.stream("GET", f"/v1/files/{made['id']}/content") as response:
        async for piece in response.aiter_raw():
            size += len(piece)
    assert size == LARGE_MIB * MIB
    assert peak_mib(pod) - before < GROWTH_MIB


async def test_a_pod_killed_in_the_middle_leaves_nothing_that_is_seen(
    pod: Command, client: httpx.AsyncClient, redis: ArqRedis, redis_url: str, files_url: str
) -> None:
    """And what it has left goes, though it never comes back."""
    killed = asyncio.Event()
    going = asyncio.create_task(upload(client, SMALL_MIB, killed))
    await wait_until(lambda: left_in(files_url))
    pod.signal(signal.SIGKILL)
    await asyncio.to_thread(pod.wait)
    killed.set()
    with pytest.raises(httpx.TransportError):
        await going
    async with serving(settings_for(redis_url, files_url=files_url)) as other:
        assert (await other.openai.files.list()).data == []
        ((member, _),) = await redis.zrange(keys.FILES_DUE, 0, -1, withscores=True)
        files = other.server.config.app.state.pod.files  # type: ignore[union-attr]
        assert await files.sweep() == 0
        await redis.zadd(keys.FILES_DUE, {member: 1})
        assert await files.sweep() == 1
    assert left_in(files_url) == []


# What it says at its start


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere://x/y", "Protocol not known: nowhere"),
        ("s3://", "names no bucket"),
        ("/dev/null/files", "files can't be kept in /dev/null/files: Not a directory"),
    ],
)
def test_a_storage_that_can_not_be_is_said_at_the_start(redis_url: str, url: str, words: str) -> None:
    with llmboost("api", "--port", "0", "--redis-url", redis_url, "--files-url", url) as command:
        assert command.wait() == 2
        (line,) = command.err
        assert line.startswith("llmboost api: error: ")
        assert words in line


def test_a_storage_that_is_away_is_waited_for(redis_url: str) -> None:
    """As Redis is: the pod starts all the same."""
    away = {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    flags = ["--port", "0", "--redis-url", redis_url, "--files-url", "s3://some-bucket/x"]
    with llmboost("api", *flags, env=away) as command:
        command.wait_for_line("can't be reached yet", among="err")
        command.wait_for_line("ready: serving on", among="err")


def test_serve_says_it_too(redis_url: str) -> None:
    flags = ["--port", "0", "--redis-url", redis_url, "--files-url", "nowhere://x"]
    with llmboost("serve", *flags) as command:
        line = command.wait_for_line("llmboost serve: error: ", among="err")
        assert "Protocol not known: nowhere" in line
        assert command.wait() == 1
