"""The documentation's examples as they are written: only the port is another, and where the SDK starts
its own worker, the model."""

import asyncio
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from llmboost.entries import Delta
from llmboost.streams import TokenStreams
from tests.commands import Command
from tests.e2e.system import LOADING_S, MODEL, SEED_NAME, System
from tests.integration.answers import Frame, frames_of

EXAMPLES = Path(__file__).parent / "seed"
PORT = "localhost:8011"


def example(name: str, folder: Path, system: System) -> Path:
    """A copy of an example that asks this system."""
    written = (EXAMPLES / name).read_text()
    assert written.count(PORT) == 1
    copy = folder / name
    copy.write_text(written.replace(PORT, system.url.removeprefix("http://")))
    return copy


async def run(*command: str, env: dict[str, str] | None = None) -> str:
    """What a command prints; it must end by itself, well, and leave nothing behind."""
    with Command(command, env=env) as running:
        code = await asyncio.to_thread(running.wait, LOADING_S)
        assert code == 0, running.log
        assert running.family() == []
        return "\n".join(running.out) + "\n"


class Streams:
    """The streams that are made within a `with`."""

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
        """What the worker wrote into the one stream with generated tokens (rendering a template makes one
        without)."""
        ids = [key.decode().partition("{")[2].rstrip("}") for key in await self.keys() - self.before]
        logs = [[entry for _, entry in await self.streams.read(job_id)] for job_id in ids]
        answers = []
        for log in logs:
            choices = [choice for entry in log if isinstance(entry, Delta) for choice in entry.choices]
            if any(choice.token_ids for choice in choices):
                answers.append("".join(choice.text for choice in choices))
        (answer,) = answers
        return answer


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


SDK = ["sdk_sync.py", "sdk_async.py"]


@pytest.mark.parametrize("name", SDK)
async def test_sdk_example_on_a_running_system(system: System, streams: TokenStreams, name: str) -> None:
    """The file as it is, not a letter changed; LLMBOOST_REDIS_URL names the system, which serves the model
    under the example's name. It prints what the worker wrote."""
    async with Streams(streams) as made:
        env = {"LLMBOOST_REDIS_URL": system.redis_url}
        printed = await run(sys.executable, str(EXAMPLES / name), env=env)
        written = await made.text()
    assert written.strip()
    assert printed == f"{written}\n"


async def test_sdk_example_with_processes_of_its_own(tmp_path: Path) -> None:
    """With another model's name, the example starts all it needs, prints a story, and leaves nothing."""
    name = "sdk_sync.py"
    written = (EXAMPLES / name).read_text()
    assert written.count(SEED_NAME) == 1
    copy = tmp_path / name
    copy.write_text(written.replace(SEED_NAME, MODEL))
    printed = await run(sys.executable, str(copy), env={"LLMBOOST_THREADS": "1", "TMPDIR": str(tmp_path)})
    assert len(printed.split()) > 3
    left = [each for each in os.listdir(tmp_path) if not each.startswith("torchinductor")]  # torch's own
    assert left == [name]
