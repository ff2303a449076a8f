"""Jobs in a generator's hands, without the worker around it."""

import asyncio

from llmboost.jobs import GenerationJob
from llmboost.streams import TokenStreams
from llmboost_worker.generation import Generator
from llmboost_worker.publisher import Publisher
from tests.engines import ScriptedEngine
from tests.unit.text_tokenizers import byte_level
from tests.waiting import wait_until


class SteppedGenerator(Generator):
    """Its engine steps when it is told to; nothing is appended before `publisher.run`."""

    def __init__(self, streams: TokenStreams, engine: ScriptedEngine, interval: int = 1) -> None:
        self.engine = engine
        self.publisher = Publisher(streams, interval)
        self.tokenizer = byte_level()
        super().__init__(engine, engine.info, self.tokenizer, streams, self.publisher, "worker")
        engine.start(self.deliver, lambda error: None)

    async def begin(self, job: GenerationJob, attempt: int = 1) -> "asyncio.Task[None]":
        """Runs it; returns once it is in the engine, or over without."""
        task = asyncio.create_task(self.run(job, attempt))
        await wait_until(lambda: task.done() or any(id.startswith(job.id) for id in self.engine.sequences))
        return task
