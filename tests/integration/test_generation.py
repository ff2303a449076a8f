"""One job in a worker's hands, without the worker around it."""

import asyncio

import pytest
from arq.connections import ArqRedis

from llmboost.entries import Terminal
from llmboost.queue import JobQueue
from llmboost.streams import StreamFenced, TokenStreams, Transcript
from llmboost_worker.generation import Generator
from llmboost_worker.publisher import Publisher
from tests.engines import ScriptedEngine
from tests.jobs import make_job
from tests.unit.text_tokenizers import byte_level
from tests.waiting import wait_until


@pytest.mark.parametrize("steps", [2, 3], ids=["with a token to come", "after the last token"])
async def test_tokens_that_a_lost_lease_discards_are_left_to_the_next_attempt(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams, steps: int
) -> None:
    """A lease is lost while tokens, perhaps all there will be, have been generated but not appended: the
    attempt leaves the stream open, for sealing it would end it well without them."""
    tokenizer = byte_level()
    engine = ScriptedEngine([70, 71, 72])
    publisher = Publisher(redis, streams)  # not run, so that nothing is appended
    generator = Generator(engine, engine.info, tokenizer, streams, publisher, "worker")
    job = make_job(max_tokens=3, needs_audience=False)
    await queue.submit(job)
    engine.start(generator.deliver, lambda error: None)
    attempt = asyncio.create_task(generator.run(job, 1))
    await wait_until(lambda: engine.sequences)
    for _ in range(steps):
        engine.step()
    await asyncio.sleep(0)  # the attempt takes note of what it has
    generator.end(job.id, StreamFenced("the lease was lost"))
    await attempt
    log = Transcript()
    for entry_id, entry in await streams.read(job.id):
        log.apply(entry_id, entry)
    assert log.terminal is None
    assert log.choices == {}
    await queue.cancel(job.id, Terminal("test"))
