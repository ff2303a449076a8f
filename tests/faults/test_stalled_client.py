"""Clients that read nothing while real pods and workers serve them and others."""

import json
import re
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis

from llmboost import inbox, keys
from llmboost.connection import connect
from llmboost.entries import Delta
from llmboost.jobs import GenerationJob
from llmboost.streams import TokenStreams
from tests.commands import wait_until
from tests.e2e.asking import hear_all, long_story, path_of, transcript
from tests.e2e.system import ONE_THREAD, System
from tests.integration.answers import frames_of
from tests.integration.api_pod import Step, chat, ends, says, working
from tests.waiting import wait_until as wait_until_async

STALLED = 12
PATIENT, SHORT = 0, 1
"""Pods: one with the default patience, one with little."""
SHORT_TIMEOUT_S = 2.0
LET_GO_S = 60.0
"""Far beyond what it takes, for a crowded machine."""

WRITE_BUFFER = 64 * 1024
"""What uvicorn lets wait in the process for one client."""
CLIENT_COSTS = WRITE_BUFFER + 4 * inbox.BYTES
"""What a client may cost the pod: that, an inbox, and the batch before it, as read, decoded and framed."""

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """Two pods and a worker."""
    with System() as running:
        running.start_worker(*ONE_THREAD, "--grace", "1")
        running.start_pod("--grace", "1")
        running.start_pod("--grace", "1", "--send-timeout", str(SHORT_TIMEOUT_S))
        running.await_worker("worker")
        yield running


@pytest.fixture
async def redis(system: System) -> AsyncIterator[Redis]:
    client = connect(system.redis_url)
    yield client
    await client.aclose()


class StalledClients:
    """Each has sent a request; their kernels take as little of the answers as can be, and they nothing."""

    def __init__(self, url: str, bodies: Iterable[dict[str, Any]]) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._stack = ExitStack()
        self.sockets: list[socket.socket] = []
        for body in bodies:
            client = self._stack.enter_context(socket.socket())
            client.settimeout(LET_GO_S)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect((host, int(port)))
            data = json.dumps({**body, "stream": True}).encode()
            head = f"POST {path_of(body)} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n\r\n"
            client.sendall(head.encode() + data)
            self.sockets.append(client)

    def __enter__(self) -> "StalledClients":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def held_by(self, pod: psutil.Process) -> int:
        """How many of their connections the pod still has."""
        ports = {client.getsockname()[1] for client in self.sockets}
        return sum(bool(each.raddr) and each.raddr.port in ports for each in pod.net_connections("tcp"))


def process_of(system: System, pod: int) -> psutil.Process:
    return system.parts[f"pod-{pod}"].member("api")


async def stream_ids(redis: Redis) -> set[str]:
    """Of all requests that are known."""
    pattern = keys.stream("*")
    return {key.decode().partition("{")[2].rstrip("}") async for key in redis.scan_iter(pattern, count=1000)}


async def test_clients_that_read_nothing_hold_nobody_up(system: System, redis: Redis) -> None:
    """While they stall, others on the same pod and worker get what they would have got without them; after
    the timeout the pod has none of their connections, and after the grace the worker none of their sequences.
    """
    others = [long_story(60, seed=number) for number in range(8)]
    pod = process_of(system, SHORT)
    async with system.async_openai(SHORT) as client:
        expected = await hear_all(client, others)
        before = await stream_ids(redis)
        with StalledClients(system.urls[SHORT], [long_story(1800)] * STALLED) as stalled:
            wait_until(lambda: system.busy() == STALLED, within=LET_GO_S, what="all of them run")
            assert stalled.held_by(pod) == STALLED
            ids = await stream_ids(redis) - before
            heard = await hear_all(client, others)
            wait_until(lambda: not stalled.held_by(pod), within=LET_GO_S, what="the pod has let go of them")
            system.await_idle(within=LET_GO_S)
    assert [each.text for each in heard] == [each.text for each in expected]
    assert len(ids) == STALLED
    streams = TokenStreams(redis, retention=600)
    for each in ids:
        terminal = (await transcript(streams, each)).terminal
        assert terminal is not None
        assert terminal.error is not None
        assert terminal.error.code == "client_gone", "it was not ended because nobody read it"


async def test_clients_that_read_again_in_time_get_everything(system: System, redis: Redis) -> None:
    """They begin to read when their answers have long been made, and were too large to wait in the kernel."""
    before = await stream_ids(redis)
    bodies = [long_story(150, seed=number, logprobs=True, top_logprobs=20) for number in range(3)]
    streams = TokenStreams(redis, retention=600)

    async def all_made() -> bool:
        made = await stream_ids(redis) - before
        return len(made) == len(bodies) and all(await streams.sealed(list(made)))

    with StalledClients(system.urls[PATIENT], bodies) as stalled:
        await wait_until_async(all_made, within=300)
        answers = [frames_of(read_all(client)) for client in stalled.sockets]
    texts = []
    for frames in answers:
        assert frames[-1].data == "[DONE]"
        deltas = [frame.json["choices"][0]["delta"] for frame in frames[:-1]]
        texts.append("".join(delta["content"] for delta in deltas))
    logged = [await text_in_log(redis, each) for each in await stream_ids(redis) - before]
    assert sorted(texts) == sorted(logged)


async def text_in_log(redis: Redis, job_id: str) -> str:
    """What the worker wrote."""
    entries = await TokenStreams(redis, retention=600).read(job_id)
    deltas = [entry for _, entry in entries if isinstance(entry, Delta)]
    return "".join(choice.text for delta in deltas for choice in delta.choices)


def read_all(client: socket.socket) -> str:
    """The body of the response."""
    with HTTPResponse(client) as response:
        response.begin()
        return response.read().decode()


async def test_clients_that_read_nothing_cost_little(system: System, redis: Redis) -> None:
    """Of answers of four megabytes each, made as fast as Redis takes them, a pod keeps a bounded part."""
    texts = [f"{number:06} " + "x" * 1000 for number in range(4000)]

    def script(job: GenerationJob) -> Iterable[Step]:
        deltas = says(texts)
        for start in range(0, len(deltas), 100):
            yield [*deltas[start : start + 100]]
        yield ends(len(texts))

    pod = process_of(system, PATIENT)
    async with working(redis, TokenStreams(redis, retention=5)) as worker:  # type: ignore[arg-type]
        worker.script = script

        async def check_whole() -> None:
            async with system.async_http(PATIENT) as http:
                response = await http.post("/v1/chat/completions", json=chat(stream=True))
            assert response.text.count("data: ") == len(texts) + 2

        await check_whole()  # what the first stream costs is no client's cost
        before = peak_memory(pod)
        with StalledClients(system.urls[PATIENT], [chat()] * STALLED) as stalled:
            await wait_until_async(lambda: worker.finished > STALLED, within=LET_GO_S)
            # By the time that it has passed on all of this, it has taken what it takes for the others.
            await check_whole()
            assert stalled.held_by(pod) == STALLED
            assert peak_memory(pod) - before < STALLED * CLIENT_COSTS


def peak_memory(process: psutil.Process) -> int:
    """Bytes that it has had resident at most."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024
