"""Clients that stall, in the middle of an answer or of a request: they cost little, and are let go of."""

import asyncio
import json
import logging
import math
import re
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from llmboost import inbox
from llmboost.jobs import GenerationJob
from llmboost_api.connections import BODY_RATE, MAX_HEAD_BYTES, UNSENT_BYTES, ClientConnection

from ..waiting import wait_until
from .api_pod import (
    RunningPod,
    ScriptedWorker,
    Step,
    chat,
    ends,
    frames_of,
    says,
    serving,
    settings_for,
)

SEND_TIMEOUT_S = 0.7
RECEIVE_TIMEOUT_S = 0.3
LONG = [f"{number:06} " + "x" * 1000 for number in range(4000)]
"""Texts of an answer that fits into no buffer."""
WRITE_BUFFER = 64 * 1024
"""What uvicorn lets wait in the process; one write may overshoot."""


@pytest.fixture
async def pod(redis_url: str, worker: ScriptedWorker) -> AsyncIterator[RunningPod]:
    """One that has little patience."""
    settings = settings_for(
        redis_url, send_timeout=SEND_TIMEOUT_S, receive_timeout=RECEIVE_TIMEOUT_S, grace=0.5
    )
    async with serving(settings) as running:
        yield running


@pytest.fixture
async def patient_pod(redis_url: str, worker: ScriptedWorker) -> AsyncIterator[RunningPod]:
    """One that does not let go of a client while a crowded machine gets round to it."""
    async with serving(settings_for(redis_url)) as running:
        yield running


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> "asyncio.Queue[ClientConnection]":
    """The connections that the pod has looked at since their time was over."""
    queue: asyncio.Queue[ClientConnection] = asyncio.Queue()
    look = ClientConnection._on_late

    def noted(connection: ClientConnection) -> None:
        look(connection)
        queue.put_nowait(connection)

    monkeypatch.setattr(ClientConnection, "_on_late", noted)
    return queue


def long_story(job: GenerationJob) -> Iterable[Step]:
    deltas = says(LONG)
    for start in range(0, len(deltas), 100):
        yield [*deltas[start : start + 100]]
    yield ends(len(LONG))


def connections(pod: RunningPod) -> list[ClientConnection]:
    """Those that the pod holds."""
    return list(pod.server.server_state.connections)  # type: ignore[arg-type]


@asynccontextmanager
async def connected(pod: RunningPod) -> AsyncIterator[socket.socket]:
    """A client whose kernel takes as little for it as can be."""
    with socket.socket() as client:
        client.setblocking(False)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", pod.server.port))
        yield client


async def send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def rest_of(client: socket.socket) -> bytes:
    """All that comes, until the server closes the connection."""
    received = bytearray()
    while data := await asyncio.get_running_loop().sock_recv(client, 1 << 16):
        received += data
    return bytes(received)


def post(body: dict[str, Any], *headers: str) -> bytes:
    data = json.dumps(body).encode()
    lines = ["POST /v1/chat/completions HTTP/1.1", "Host: pod", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


# In the middle of an answer


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("script", ["long", "short"])
async def test_a_client_that_reads_nothing_is_let_go_of(
    pod: RunningPod, worker: ScriptedWorker, stream: bool, script: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is gone, wherever the answer waits: in the pod, or all of it in the kernel already."""
    caplog.set_level(logging.INFO)
    # More than the client's own kernel takes.
    worker.script = long_story if script == "long" else lambda job: [*says(["x" * 30_000]), ends(1)]
    async with connected(pod) as client:
        await send(client, post(chat(stream=stream)))
        await wait_until(lambda: worker.finished)
        (connection,) = connections(pod)
        await wait_until(lambda: not connections(pod))
        assert connection.transport.is_closing()
    await wait_until(lambda: not pod.generations)
    assert [record.levelname for record in caplog.records if "stopped reading" in record.message] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_client_that_reads_nothing_costs_little(
    patient_pod: RunningPod, worker: ScriptedWorker
) -> None:
    """What it has not read waits in Redis: of four megabytes, the pod and the kernel have taken little."""
    worker.script = long_story
    async with connected(patient_pod) as client:
        await send(client, post(chat(stream=True)))
        await wait_until(lambda: worker.finished)
        (connection,) = connections(patient_pod)
        await wait_until(lambda: connection.flow.write_paused)
        (generation,) = patient_pod.generations
        ((_, subscription),) = generation._merge._open
        await wait_until(lambda: not subscription._inbox.hungry)
        # One write and one read may overshoot.
        assert connection.transport.get_write_buffer_size() < WRITE_BUFFER + 2 * inbox.BYTES
        assert subscription._inbox.size < 2 * inbox.BYTES
        last = int(subscription._inbox.cursor.split(b"-")[1])
        assert last * 1000 < WRITE_BUFFER + UNSENT_BYTES + 4 * inbox.BYTES


async def test_a_client_that_reads_again_in_time_gets_everything(
    patient_pod: RunningPod, worker: ScriptedWorker
) -> None:
    """However often it pauses."""
    worker.script = long_story
    async with connected(patient_pod) as client:
        await send(client, post(chat(stream=True), "Connection: close"))
        await wait_until(lambda: worker.finished)
        (connection,) = connections(patient_pod)
        received = bytearray()
        for _ in range(4):
            await wait_until(lambda: connection.flow.write_paused)
            while connection.flow.write_paused:
                received += await asyncio.get_running_loop().sock_recv(client, 1 << 16)
        received += await rest_of(client)
    frames = frames_of(dechunked(bytes(received)))
    texts = [frame.json["choices"][0]["delta"]["content"] for frame in frames[:-1]]
    assert texts == [*LONG, ""]
    assert frames[-1].data == "[DONE]"


async def test_a_pod_that_goes_does_not_wait_for_it(
    redis_url: str, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """When the drain is over: a client that reads nothing would not read last words. It can resume."""
    worker.script = long_story
    async with serving(settings_for(redis_url, drain_timeout=0.1)) as pod, connected(pod) as client:
        await send(client, post(chat(stream=True)))
        await wait_until(lambda: worker.finished)
        (connection,) = connections(pod)
        await wait_until(lambda: connection.flow.write_paused)
        pod.server.should_exit = True
        await wait_until(lambda: not connections(pod), within=30)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def dechunked(response: bytes) -> str:
    """The body of a response in chunked encoding."""
    body, rest = bytearray(), response.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body.decode()


# In the middle of a request


PIECE = b" " * math.ceil(BODY_RATE * RECEIVE_TIMEOUT_S)
"""So much of a body has to come in the time."""
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: pod\r\nContent-Length: 100\r\n"


@pytest.mark.parametrize(
    "beginning", [b"", b"POST /v1", HEAD, b"\r\n"], ids=["nothing", "a path", "a head", "a line break"]
)
async def test_a_request_that_does_not_come_is_not_waited_for(pod: RunningPod, beginning: bytes) -> None:
    async with connected(pod) as client:
        await send(client, beginning)
        assert await rest_of(client) == b""
    assert not connections(pod)


async def test_a_body_that_does_not_come_whole_is_answered(pod: RunningPod) -> None:
    """408, which tells a client that nothing has begun; bytes that trickle in don't put it off."""
    async with connected(pod) as client:
        await send(client, HEAD + b"\r\n")
        (connection,) = await wait_until(lambda: connections(pod))
        answer = asyncio.create_task(rest_of(client))
        sent, clock = 0, asyncio.get_running_loop().time
        # Not to the end: what is under way when the pod closes the connection would cost us its answer.
        while (late := connection._late) and late.when() - clock() > RECEIVE_TIMEOUT_S / 4:
            sent += 1
            assert sent < 100
            await send(client, b" ")
            await asyncio.wait([answer], timeout=0.02)  # the client's pace
        head, _, body = (await answer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert json.loads(body)["error"]["code"] == "request_incomplete"
    assert not connections(pod)


async def test_a_body_that_stops_coming_is_answered(
    pod: RunningPod, looks: "asyncio.Queue[ClientConnection]"
) -> None:
    """What came in time is no credit for later."""
    async with connected(pod) as client:
        await send(client, HEAD.replace(b"100", b"1000000") + b"\r\n" + PIECE)
        connection = await asyncio.wait_for(looks.get(), 10)
        assert not connection.transport.is_closing()
        assert b"408 Request Timeout" in await rest_of(client)


async def test_a_body_that_keeps_coming_may_take_its_time(
    pod: RunningPod, looks: "asyncio.Queue[ClientConnection]"
) -> None:
    """A large one does, over a slow line."""
    pieces = 3
    async with connected(pod) as client:
        body = json.dumps(chat()).encode()
        head = post(chat(), "Connection: close").partition(b"\r\n\r\n")[0].decode()
        head = re.sub(r"Content-Length: \d+", f"Content-Length: {len(body) + pieces * len(PIECE)}", head)
        await send(client, head.encode() + b"\r\n\r\n")
        for _ in range(pieces):
            await send(client, PIECE)
            await asyncio.wait_for(looks.get(), 10)
        await send(client, body)
        assert b"HTTP/1.1 200 OK" in await rest_of(client)


@pytest.mark.parametrize("line", [b"x-word: " + b"y" * 100 + b"\r\n", b"y" * 100], ids=["many", "long"])
async def test_a_head_without_end_is_refused(pod: RunningPod, line: bytes) -> None:
    """However fast it comes: many headers, or one that goes on and on."""
    async with connected(pod) as client:
        await send(client, b"GET /health HTTP/1.1\r\nx-long: ")
        (connection,) = await wait_until(lambda: connections(pod))
        sent = 0
        while not connection.transport.is_closing():
            sent += len(line)
            assert sent < 2 * MAX_HEAD_BYTES
            await send(client, line)
            await asyncio.sleep(0)  # the pod, in the same loop, may read it
    assert sent > MAX_HEAD_BYTES / 2


async def test_a_connection_that_idles_after_an_answer_is_not_kept_by_line_breaks(pod: RunningPod) -> None:
    async with connected(pod) as client:
        await send(client, b"GET /health HTTP/1.1\r\nHost: pod\r\n\r\n")
        await wait_until(lambda: pod.server.server_state.total_requests)
        await send(client, b"\r\n")
        assert b"200 OK" in await rest_of(client)


async def test_a_request_refused_before_its_body_has_come(pod: RunningPod) -> None:
    """The rest of the body is not waited for without end either, though the answer has been given."""
    async with connected(pod) as client:
        await send(client, b"POST /nowhere HTTP/1.1\r\nHost: pod\r\nContent-Length: 100\r\n\r\n")
        assert b"404 Not Found" in await rest_of(client)


@pytest.mark.parametrize("extra", [b"\r\n", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: pod\r\n\r\n"])
async def test_the_limit_is_for_the_request_and_not_for_the_answer(
    pod: RunningPod, worker: ScriptedWorker, extra: bytes, looks: "asyncio.Queue[ClientConnection]"
) -> None:
    """An answer takes as long as it takes, even if the client has begun to send its next request."""
    going = asyncio.Event()
    worker.script = lambda job: [*says(["Once"], reason=None), going.wait(), ends(1)]
    async with connected(pod) as client:
        await send(client, post(chat(stream=True), "Connection: close"))
        await wait_until(lambda: worker.jobs)
        await send(client, extra)
        for _ in range(3):
            await asyncio.wait_for(looks.get(), 10)
        going.set()
        assert b"[DONE]" in await rest_of(client)
