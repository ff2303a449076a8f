"""A worker whose engine fails: on some requests, which end with an error while others go on, or for good."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from arq.connections import ArqRedis
from transformers import LlamaConfig

from llmboost import keys
from llmboost.entries import StreamError, Terminal
from llmboost.jobs import Prompt
from llmboost.queue import JobQueue
from llmboost.settings import WorkerSettings
from llmboost.streams import TokenStreams
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine
from llmboost_worker.engine.transformers.runner import ModelRunner
from llmboost_worker.engine.transformers.sequence import Sequence
from llmboost_worker.text import Tokenizer
from llmboost_worker.text.choice import TextDelta
from llmboost_worker.worker import WorkerProcess
from tests.integration.workers import (
    GRACE_S,
    LEASE_S,
    RETENTION_S,
    StartWorker,
    ended,
    registered,
    running,
    step_until,
    submit,
    transcript,
)
from tests.jobs import MODEL
from tests.unit.engine_models import COMMON, save_model
from tests.waiting import wait_until

NAN, RAISES = 300, 301
"""Tokens: the model's embedding of the one is not a number, at the other a step throws."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LlamaConfig(**{**COMMON, "vocab_size": 420, "eos_token_id": None})
    return save_model(config, tmp_path_factory.mktemp("model"), poison=NAN)


@pytest.fixture
async def worker(
    redis: ArqRedis, redis_url: str, tokenizer: Tokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[WorkerProcess]:
    """A worker with a real engine, which is the folder's model's."""
    forward = ModelRunner.forward

    def fragile(self: ModelRunner, batch: list[Sequence], *args: Any) -> Any:
        if any(RAISES in sequence.tokens for sequence in batch):
            raise RuntimeError("there is no such kernel\nstack")
        return forward(self, batch, *args)

    monkeypatch.setattr(ModelRunner, "forward", fragile)
    settings = WorkerSettings(
        redis_url=redis_url, model=MODEL, lease=LEASE_S, grace=GRACE_S, retention=RETENTION_S
    )
    engine = TransformersEngine(EngineConfig(model=str(folder), threads=1, kv_cache_memory=0.1))
    process = WorkerProcess(settings, load=lambda _: (engine, tokenizer))
    task = asyncio.create_task(process.arq.async_run())
    await wait_until(lambda: registered(redis, process))
    yield process
    process.arq.handle_sig(15)
    await asyncio.gather(task, return_exceptions=True)
    await process.arq.close()
    for job_id in await redis.zrange(keys.OPEN, 0, -1):
        await process.queue.cancel(job_id.decode(), Terminal("test"))


async def test_requests_that_fail_are_sealed_with_an_error_and_their_neighbours_finish(
    worker: WorkerProcess, queue: JobQueue, streams: TokenStreams, caplog: pytest.LogCaptureFixture
) -> None:
    """Streams that run when the others come, in the same steps."""
    options: dict[str, Any] = {
        "logit_bias": {NAN: -100.0, RAISES: -100.0},
        "max_tokens": 200,
        "temperature": 0.0,
    }

    caplog.set_level(logging.INFO)
    neighbours = [await submit(queue, prompt=Prompt(token_ids=[5, 6, i]), **options) for i in range(3)]

    async def begun() -> bool:
        logs = [await transcript(streams, job) for job in neighbours]
        return all(log.choices for log in logs)

    await wait_until(begun)
    nothing_left: dict[str, Any] = {"stop_token_ids": tuple(range(420)), "min_tokens": 3}
    nan = await submit(queue, prompt=Prompt(token_ids=[5, NAN, 7]))
    raises = await submit(queue, prompt=Prompt(token_ids=[5, RAISES]), n=2)
    refused = await submit(queue, prompt=Prompt(token_ids=[5]), **nothing_left)
    errors: list[StreamError] = []
    for job in (nan, raises, refused):
        error = (await ended(streams, job)).error
        assert error is not None
        errors.append(error)
    assert [(error.status, error.code) for error in errors] == [
        (500, "engine_error"),
        (500, "engine_error"),
        (400, "invalid_request"),
    ]
    for error, words in zip(errors, ("NaN", "no such kernel)", "min_tokens"), strict=True):
        assert words in error.message
    for job in neighbours:
        assert (await ended(streams, job)).error is None
        assert len((await transcript(streams, job)).choices[0].token_ids) == 200
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("generation")]
    for job in (nan, raises, refused):
        assert [line for line in lines if f"request_id={job.id}" in line], "an operator finds it by its id"


async def test_a_token_that_cannot_be_turned_into_text_costs_no_other_request_its_own(
    start_worker: StartWorker,
    queue: JobQueue,
    streams: TokenStreams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All have a token in the same step; the failing one is taken first."""
    worker = await start_worker()
    jobs = [await submit(queue) for _ in range(3)]
    await running(worker, 3)
    first = next(iter(worker.engine.sequences))
    bad = next(job for job in jobs if first.startswith(job.id))
    assert worker.process.generator is not None
    choice = worker.process.generator.running[bad.id].sequences[first]

    def push(token_id: int) -> TextDelta:
        raise KeyError(token_id)

    monkeypatch.setattr(choice.text, "push", push)
    await step_until(worker, lambda: not worker.engine.sequences)
    error = (await ended(streams, bad)).error
    assert error is not None
    assert (error.status, error.code) == (500, "worker_error")
    for job in jobs:
        if job is not bad:
            assert (await ended(streams, job)).error is None
            assert len((await transcript(streams, job)).choices[0].token_ids) == 12


async def test_an_engine_that_ends_takes_its_worker_with_it(
    worker: WorkerProcess,
    queue: JobQueue,
    streams: TokenStreams,
    redis: ArqRedis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A lost device: the process ends, so that its leases lapse and its jobs go on elsewhere."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)

    def lost(self: ModelRunner, *args: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(ModelRunner, "forward", lost)
    job = await submit(queue, prompt=Prompt(token_ids=[5]))
    await wait_until(lambda: exits)
    assert exits == [os.EX_SOFTWARE]
    assert (await transcript(streams, job)).terminal is None, "another worker may still answer it"
    assert await redis.zscore(keys.leases(MODEL), job.id) is not None
