"""Structured output through a pod and a worker with a real engine, as OpenAI's own client asks for it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from arq.connections import ArqRedis
from pydantic import BaseModel, Field
from transformers import LlamaConfig

from llmboost.entries import Started
from llmboost.jobs import Grammar
from llmboost.queue import JobQueue
from llmboost.settings import WorkerSettings
from llmboost.streams import TokenStreams
from llmboost_worker.engine.transformers import EngineConfig, TransformersEngine
from llmboost_worker.worker import WorkerProcess
from tests.unit.engine_models import COMMON, save_model
from tests.unit.grammars import PADDING, tokenizer_of
from tests.unit.text_tokenizers import token_id

from ..jobs import MODEL
from ..waiting import wait_until
from .api_pod import RunningPod, serving, settings_for
from .batch_inputs import begin, line, outcome
from .workers import GRACE_S, RETENTION_S, ended, registered, submit, text, transcript

LEASE_S = 1.0
MESSAGES: Any = [{"role": "user", "content": "How is the weather?"}]


class Place(BaseModel):
    name: str = Field(max_length=8)
    height: int | None = Field(ge=0, le=9000)


class Report(BaseModel):
    sky: Literal["clear", "cloudy"]
    places: list[Place] = Field(max_length=2)
    sure: bool


SCHEMA = Report.model_json_schema()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizer_of("byte_level")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    vocabulary = {
        "vocab_size": tokenizer.vocab_size + PADDING,
        "eos_token_id": token_id(tokenizer, "<|end|>"),
    }
    return save_model(LlamaConfig(**{**COMMON, **sizes, **vocabulary}), tmp_path_factory.mktemp("model"))


class Worker:
    """A whole worker, but in this process."""

    def __init__(self, model: Path, redis_url: str) -> None:
        tokenizer = tokenizer_of("byte_level")
        config = EngineConfig(str(model), threads=1, kv_cache_memory=0.1, max_num_seqs=8)
        self.engine = TransformersEngine(config, tokenizer.token_bytes)
        settings = WorkerSettings(
            redis_url=redis_url, model=MODEL, lease=LEASE_S, grace=GRACE_S, retention=RETENTION_S
        )
        self.process = WorkerProcess(settings, load=lambda _: (self.engine, tokenizer))
        self.task = asyncio.create_task(self.process.arq.async_run())

    async def stop(self) -> None:
        self.process.arq.handle_sig(15)
        await asyncio.gather(self.task, return_exceptions=True)
        await self.process.arq.close()


@pytest.fixture
async def engine_pod(redis: ArqRedis, redis_url: str, model: Path) -> AsyncIterator[RunningPod]:
    """A pod with a worker behind it that computes."""
    worker = Worker(model, redis_url)
    await wait_until(lambda: registered(redis, worker.process))
    async with serving(settings_for(redis_url)) as pod:
        yield pod
    await worker.stop()


async def test_chats_are_parsed(engine_pod: RunningPod) -> None:
    completion = await engine_pod.openai.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Report, n=3, seed=1
    )
    reports = [choice.message.parsed for choice in completion.choices]
    assert all(isinstance(report, Report) for report in reports)
    assert len({str(report) for report in reports}) > 1
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}


async def test_streamed_chats_are_parsed(engine_pod: RunningPod) -> None:
    async with engine_pod.openai.chat.completions.stream(
        model=MODEL, messages=MESSAGES, response_format=Report, seed=2
    ) as stream:
        events = [event async for event in stream]
    parsed = (await stream.get_final_completion()).choices[0].message.parsed
    assert isinstance(parsed, Report)
    assert "content.done" in {event.type for event in events}


async def test_responses_are_parsed_and_say_their_format(engine_pod: RunningPod) -> None:
    response = await engine_pod.openai.responses.parse(
        model=MODEL, input="How is the weather?", text_format=Report, temperature=1
    )
    assert isinstance(response.output_parsed, Report)
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == "json_schema"
    assert response.text.format.name == "Report"
    again = await engine_pod.openai.responses.retrieve(response.id)
    assert again.text is not None
    assert again.text.to_dict() == response.text.to_dict()
    await engine_pod.openai.responses.delete(response.id)


async def test_vllms_fields_hold_on_both_endpoints(engine_pod: RunningPod) -> None:
    client = engine_pod.openai
    for fields, pattern in (
        ({"guided_regex": r"\d{3}-[a-z]{4}"}, r"\d{3}-[a-z]{4}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, "b*a"),
    ):
        chat = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, n=2, extra_body=fields, max_tokens=500
        )
        plain = await client.completions.create(
            model=MODEL, prompt="It is", n=2, extra_body=fields, max_tokens=500
        )
        for said in [choice.message.content for choice in chat.choices] + [
            choice.text for choice in plain.choices
        ]:
            assert re.fullmatch(pattern, said or ""), fields


async def test_lines_of_a_batch_take_the_same_bodies(engine_pod: RunningPod) -> None:
    """And one that can't be enforced is an error of its line."""
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 500}
    good, bad = {**body, "guided_choice": ["yes", "no"]}, {**body, "guided_regex": "(a"}
    batch = await begin(engine_pod.openai, [line("good", good), line("bad", bad)])
    result = await outcome(engine_pod.openai, batch.id)
    assert result.text("good") in ("yes", "no")
    assert "unclosed group" in json.dumps(result.errors["bad"])


async def test_what_cannot_be_enforced_is_a_400_that_names_its_field(engine_pod: RunningPod) -> None:
    client = engine_pod.openai
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    named: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        await client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format=named)
    assert refused.value.param == "response_format.json_schema.schema"
    with pytest.raises(openai.BadRequestError, match="unclosed group") as refused:
        await client.completions.create(
            model=MODEL, prompt="a", stream=True, extra_body={"guided_regex": "(a"}
        )
    assert refused.value.param == "guided_regex"
    flat: Any = {"format": {"type": "json_schema", "name": "a", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as refused:
        await client.responses.create(model=MODEL, input="a", text=flat, store=False)
    assert refused.value.param == "text.format.schema"


async def test_a_second_worker_goes_on_in_the_middle_of_an_answer(
    redis: ArqRedis, redis_url: str, model: Path, queue: JobQueue, streams: TokenStreams
) -> None:
    """Its first tokens are in the log, and what follows them is what the first worker would have said."""
    grammar = Grammar("json_schema", json.dumps(SCHEMA), "response_format")
    sampling = {"grammar": grammar, "max_tokens": 1500, "seed": 5, "temperature": 1.5}
    first = Worker(model, redis_url)
    await wait_until(lambda: registered(redis, first.process))
    unbroken = await submit(queue, **sampling)
    await ended(streams, unbroken)
    expected = (await transcript(streams, unbroken)).choices[0].token_ids
    job = await submit(queue, **sampling)

    async def begun() -> bool:
        return 0 in (await transcript(streams, job)).choices

    await wait_until(begun)
    second = Worker(model, redis_url)
    await first.stop()
    await ended(streams, job)
    assert sum(isinstance(entry, Started) for _, entry in await streams.read(job.id)) == 2
    log = await transcript(streams, job)
    assert log.choices[0].token_ids == expected
    Report.model_validate_json(await text(streams, job))
    await second.stop()
