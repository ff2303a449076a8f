"""The proxy of compose/, before pods made of a few lines: it holds nothing back and sends nothing twice."""

import asyncio
import os
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from llmboost.embedded import free_port
from tests.commands import ROOT, Command
from tests.waiting import wait_until

NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]

pytestmark = pytest.mark.skipif(
    NGINX is None and os.environ.get("CI") != "true", reason="needs nginx (Debian: nginx-light)"
)


@asynccontextmanager
async def pod(answer: Answer, port: int) -> AsyncIterator[list[bytes]]:
    """Answers every connection with `answer`; yields the requests it got."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        await reader.readexactly(int(length[1]) if length else 0)
        requests.append(head)
        await answer(head, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield requests
    finally:
        server.close()


@asynccontextmanager
async def proxy(folder: Path, ports: tuple[int, int]) -> AsyncIterator[httpx.AsyncClient]:
    """nginx with the repository's configuration, before pods on these ports."""
    assert NGINX, "nginx is not installed"
    own = free_port()
    text = (ROOT / "compose" / "nginx.conf").read_text()
    for name, port in zip(("api-1", "api-2"), ports, strict=True):
        text = text.replace(f"{name}:8011", f"127.0.0.1:{port}")
    text = text.replace("listen 8080", f"listen 127.0.0.1:{own}").replace(" /tmp/", f" {folder}/")
    if os.geteuid() == 0:  # or it would become a user who can't write into the folder
        text = "user root;\n" + text
    config = folder / "nginx.conf"
    config.write_text(text)
    with Command([NGINX, "-g", "daemon off;", "-c", str(config), "-p", str(folder)]) as command:

        async def listening() -> bool:
            assert command.process.poll() is None, command.log
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", own)
            except OSError:
                return False
            writer.close()
            return True

        await wait_until(listening)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{own}", timeout=20) as client:
            yield client


async def test_a_file_goes_straight_on(tmp_path: Path) -> None:
    """It is nowhere kept on its way, and its size is for the pod to judge."""
    arrived = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(1)
        arrived.set()
        writer.close()

    async def body() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.wait_for(arrived.wait(), 10)
        raise EOFError

    port = free_port()
    async with await asyncio.start_server(serve, "127.0.0.1", port), proxy(tmp_path, (port, port)) as client:
        headers = {"content-length": str(1 << 40)}
        with pytest.raises(EOFError):
            await client.post("/v1/files", content=body(), headers=headers)


async def one_word(head: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nword")
    await writer.drain()


async def hang_up(head: bytes, writer: asyncio.StreamWriter) -> None:
    """A pod that dies with the request in its hands."""


async def test_a_token_leaves_before_the_next_is_made(tmp_path: Path) -> None:
    """The pod sends a chunk only after the client has had the one before it."""
    received = asyncio.Semaphore(1)

    async def stream(head: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for number in range(20):
            await received.acquire()
            data = b"data: %d\n\n" % number
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    ports = (free_port(), free_port())
    async with (
        pod(stream, ports[0]),
        pod(stream, ports[1]),
        proxy(tmp_path, ports) as client,
        client.stream("POST", "/v1/chat/completions", json={}) as response,
    ):
        chunks = []
        async for chunk in response.aiter_raw():
            chunks.append(chunk)
            received.release()
    assert chunks == [b"data: %d\n\n" % number for number in range(20)]


async def test_a_request_is_never_sent_twice(tmp_path: Path) -> None:
    """A pod may have begun to generate before it died: the client hears of it, no other pod does."""
    ports = (free_port(), free_port())
    async with (
        pod(hang_up, ports[0]) as first,
        pod(hang_up, ports[1]) as second,
        proxy(tmp_path, ports) as client,
    ):
        response = await client.post("/v1/chat/completions", json={})
    assert response.status_code == 502
    assert len(first + second) == 1


async def test_a_pod_that_refuses_is_passed_over(tmp_path: Path) -> None:
    ports = (free_port(), free_port())
    async with pod(one_word, ports[1]) as requests, proxy(tmp_path, ports) as client:
        for _ in range(4):
            assert (await client.post("/v1/chat/completions", json={})).text == "word"
    assert len(requests) == 4


async def test_a_large_request_gets_the_pods_own_answer(tmp_path: Path) -> None:
    """Ten megabytes are too much, but in OpenAI's form, which only the pod knows."""
    ports = (free_port(), free_port())
    async with pod(one_word, ports[0]), pod(one_word, ports[1]), proxy(tmp_path, ports) as client:
        response = await client.post("/v1/chat/completions", content=b"x" * 10_000_000)
    assert response.text == "word"
