"""POST /v1/chat/completions: the protocol, as official clients and raw readers see it."""

from collections.abc import AsyncIterator

import pytest
from arq.connections import ArqRedis

from llmboost.streams import SEAL_ID, TokenStreams

from .api_pod import (
    MODEL,
    WORDS,
    RunningPod,
    ScriptedWorker,
    chat,
    serving,
    settings_for,
    working,
)


@pytest.fixture
async def worker(redis: ArqRedis, streams: TokenStreams) -> AsyncIterator[ScriptedWorker]:
    async with working(redis, streams) as running:
        yield running


@pytest.fixture
async def pod(redis_url: str, worker: ScriptedWorker) -> AsyncIterator[RunningPod]:
    async with serving(settings_for(redis_url)) as running:
        yield running


async def test_stream_is_written_as_documented(pod: RunningPod, worker: ScriptedWorker) -> None:
    """Chunks are the documented ones: role and first text together, an empty delta with the reason, [DONE]."""
    frames = await pod.stream("/v1/chat/completions", chat(stream=True))
    assert frames[-1].data == "[DONE]"
    chunks = [frame.json for frame in frames[:-1]]
    job = worker.jobs[0]
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "system_fingerprint", "choices"]
        assert (chunk["id"], chunk["object"]) == (job.id, "chat.completion.chunk")
        assert (chunk["created"], chunk["model"]) == (int(job.created), MODEL)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": {"role": "assistant", "content": "Once"}, "finish_reason": None}],
        *[[{"index": 0, "delta": {"content": word}, "finish_reason": None}] for word in WORDS[1:]],
        [{"index": 0, "delta": {}, "finish_reason": "stop"}],
    ]
    # The last word and the reason came in one entry: its cursor goes with the last of its frames.
    assert [frame.id for frame in frames] == ["1-1", "1-2", "1-3", "1-4", None, "1-5", SEAL_ID]
