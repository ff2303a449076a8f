"""Several pods and workers on one Redis, each a process that may go at any time."""

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.commands import wait_until as wait_until_sync
from tests.e2e.asking import (
    Heard,
    attempts,
    create,
    hear,
    long_story,
    path_of,
    token_ids,
    transcript,
)
from tests.e2e.system import System, scaled
from tests.waiting import wait_until

GRACE_S = 2.0
NOTICED_S = 3.0
"""What may pass on a busy machine beyond the grace period until a worker's report is read: a pod's promise
that was just renewed, the worker's next look, its next heartbeat."""


@pytest.fixture(scope="module")
def pair() -> Iterator[System]:
    """Two pods and two workers."""
    with scaled(2, 2, "--grace", f"{GRACE_S}", pod_flags=("--ping-interval", "0.05")) as running:
        yield running


@pytest.fixture
async def pair_streams(pair: System) -> AsyncIterator[TokenStreams]:
    redis = connect(pair.redis_url)
    yield TokenStreams(redis, retention=600)
    await redis.aclose()


async def test_one_load_over_two_pods_and_two_workers(
    system: System, pair: System, pair_streams: TokenStreams, streams: TokenStreams
) -> None:
    """40 streams that alternate between the pods, on two workers: each is token for token what a system with
    one worker makes of it, and both workers had a part."""
    bodies = [long_story(20 + number % 20, seed=number) for number in range(40)]
    async with pair.async_openai(0) as one, pair.async_openai(1) as other, system.async_openai() as single:
        heard = await asyncio.gather(
            *(hear((one, other)[number % 2], body) for number, body in enumerate(bodies))
        )
        expected = await asyncio.gather(*(hear(single, body) for body in bodies))
    assert [stream.text for stream in heard] == [stream.text for stream in expected]
    for stream, single_stream in zip(heard, expected, strict=True):
        assert await token_ids(pair_streams, stream.id) == await token_ids(streams, single_stream.id)
    workers = [await attempts(pair_streams, stream.id) for stream in heard]
    assert {len(each) for each in workers} == {1}
    assert len({worker for (worker,) in workers}) == 2


def send_raw(url: str, body: dict[str, Any]) -> socket.socket:
    """A request on a socket of its own."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    data = json.dumps(body).encode()
    head = f"POST {path_of(body)} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_closing_frees_the_slot(
    pair: System, pair_streams: TokenStreams, stream: bool, how: str
) -> None:
    """When its client closes the connection, politely or not, a generation that would go on for long leaves
    its slot in the engine within the grace period, as the worker reports it, and its stream is sealed."""
    pair.await_idle()
    before = {key async for key in pair_streams.redis.scan_iter("llmboost:stream:*", count=1000)}
    connection = send_raw(pair.url, long_story(1900, stream=stream))
    if stream:
        await asyncio.to_thread(connection.recv, 1)
    wait_until_sync(lambda: pair.busy() == 1, what="the sequence runs")
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    closed_at = time.monotonic()
    pair.await_idle(within=GRACE_S + NOTICED_S)
    assert time.monotonic() - closed_at < GRACE_S + NOTICED_S
    (key,) = {key async for key in pair_streams.redis.scan_iter("llmboost:stream:*", count=1000)} - before
    log = await transcript(pair_streams, key.decode().partition("{")[2].rstrip("}"))
    assert log.terminal is not None
    assert log.terminal.error is not None
    assert log.terminal.error.code == "client_gone"
    assert 0 < log.completion_tokens < 1900


async def test_a_client_that_stays_keeps_its_slot(pair: System) -> None:
    """Only who has left is cut off: beside clients that close, a stream longer than the grace period is
    whole, though its client reads nothing for a while."""
    async with pair.async_openai(1) as client:
        begun = time.monotonic()
        response = await create(client, {**long_story(600, seed=1), "stream": True})
        for _ in range(3):
            send_raw(pair.url, long_story(1900, stream=True)).close()
        heard = Heard()
        async for chunk in response:
            heard.take(chunk)
            if len(heard.pieces) == 1:
                await wait_until(lambda: time.monotonic() > begun + 1.5 * GRACE_S)
    assert heard.finish_reason == "length"
    pair.await_idle()


async def test_a_killed_worker_in_mid_stream(
    system: System, pair: System, pair_streams: TokenStreams
) -> None:
    """The worker of a running stream is killed: the client reads on, from the other worker, and the text is
    that of an unbroken run. (The last test of this file: it leaves one worker.)"""
    body = long_story(150, seed=42)
    async with system.async_openai() as single:
        unbroken = await hear(single, body)
    heard, killed = Heard(), 0
    async with pair.async_openai() as client:
        async for chunk in await create(client, {**body, "stream": True}):
            heard.take(chunk)
            if not killed and len(heard.pieces) >= 10:
                (worker,) = await attempts(pair_streams, heard.id)
                killed = int(worker.rsplit("-", 2)[1])
                os.kill(killed, signal.SIGKILL)
    assert (heard.text, heard.finish_reason) == (unbroken.text, unbroken.finish_reason)
    first, second = await attempts(pair_streams, heard.id)
    assert first != second
    log = await transcript(pair_streams, heard.id)  # refuses a gap or an overlap
    assert log.completion_tokens == 150
