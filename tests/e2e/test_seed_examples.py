"""The documentation's examples as they are written: only the port is another, and for the SDK the model."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from llmboost.entries import Delta
from llmboost.streams import TokenStreams
from tests.commands import Command
from tests.e2e.system import SEED_NAME, System
from tests.integration.api_pod import Frame, frames_of

EXAMPLES = Path(__file__).parent / "seed"
PORT = "localhost:8011"


def example(name: str, folder: Path, system: System) -> Path:
    """A copy of an example that asks this system."""
    written = (EXAMPLES / name).read_text()
    assert written.count(PORT) == 1
    copy = folder / name
    copy.write_text(written.replace(PORT, system.url.removeprefix("http://")))
    return copy


async def run(*command: str) -> str:
    """What a command prints; it must end by itself, and well."""
    with Command(command) as running:
        code = await asyncio.to_thread(running.wait, 60)
        assert code == 0, running.log
        return "\n".join(running.out) + "\n"


class Streams:
    """Which streams a piece of a test has made."""

    def __init__(self, streams: TokenStreams) -> None:
        self.streams = streams
        self.before: set[bytes] = set()

    async def keys(self) -> set[bytes]:
        return {key async for key in self.streams.redis.scan_iter("llmboost:stream:*", count=1000)}

    async def __aenter__(self) -> "Streams":
        self.before = await self.keys()
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    async def text(self) -> str:
        """What the worker wrote into the one new stream."""
        (key,) = await self.keys() - self.before
        job_id = key.decode().partition("{")[2].rstrip("}")
        entries = await self.streams.read(job_id)
        deltas = [entry for _, entry in entries if isinstance(entry, Delta)]
        return "".join(choice.text for delta in deltas for choice in delta.choices)


@pytest.mark.parametrize("name", ["openai_sync.py", "openai_async.py"])
async def test_openai_example(system: System, streams: TokenStreams, tmp_path: Path, name: str) -> None:
    """The example prints, token by token, all that the worker wrote, and nothing else."""
    async with Streams(streams) as made:
        printed = await run(sys.executable, str(example(name, tmp_path, system)))
        written = await made.text()
    assert written.strip()
    assert printed == f"{written}\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
async def test_curl_example(system: System, streams: TokenStreams, tmp_path: Path) -> None:
    """curl prints the stream in the documented form: the same objects and fields, `[DONE]` at the end."""
    async with Streams(streams) as made:
        printed = await run("sh", str(example("curl.sh", tmp_path, system)))
        written = await made.text()
    *frames, done = frames_of(printed)
    assert done.data == "[DONE]"
    assert_documented_form(frames)
    chunks = [frame.json for frame in frames]
    assert written.strip()
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == written


def assert_documented_form(frames: list[Frame]) -> None:
    documented = json.loads(
        '{"id":"chatcmpl-123","object":"chat.completion.chunk","created":1699999999,'
        '"model":"meta-llama/Llama-3.1-8B-Instruct",'
        '"choices":[{"index":0,"delta":{"role":"assistant","content":"Once"},"finish_reason":null}]}'
    )
    chunks = [frame.json for frame in frames]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for number, chunk in enumerate(chunks):
        (choice,) = chunk["choices"]
        assert documented.keys() <= chunk.keys()
        assert documented["choices"][0].keys() <= choice.keys()
        assert chunk["id"].startswith("chatcmpl-")
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == SEED_NAME
        assert type(chunk["created"]) is int
        first, last = number == 0, number == len(chunks) - 1
        assert choice["delta"].keys() == ({"role", "content"} if first else {"content"})
        assert (choice["delta"]["content"] == "") == last
        assert (choice["finish_reason"] is not None) == last
