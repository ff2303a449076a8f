"""One job in a worker's hands, without the worker around it."""

import asyncio
from dataclasses import replace

import pytest
from arq.connections import ArqRedis

from llmboost.entries import REQUEST_LOST, ChoiceDelta, Delta, Terminal
from llmboost.queue import JobQueue
from llmboost.streams import StreamFenced, TokenStreams, Writer
from llmboost.transcript import Transcript
from llmboost_worker.engine.interface import SequenceOutput, SequenceRequest
from llmboost_worker.publisher import Outbox, Publisher
from llmboost_worker.text import encode_prompt
from tests.engines import ScriptedEngine
from tests.integration.generators import SteppedGenerator
from tests.jobs import make_job
from tests.waiting import wait_until


@pytest.mark.parametrize("steps", [2, 3], ids=["with a token to come", "after the last token"])
async def test_tokens_that_a_lost_lease_discards_are_left_to_the_next_attempt(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams, steps: int
) -> None:
    """A lease is lost while tokens, perhaps all there will be, have been generated but not appended: the
    attempt leaves the stream open, for sealing it would end it well without them."""
    generator = SteppedGenerator(streams, ScriptedEngine([70, 71, 72]))
    job = make_job(max_tokens=3, needs_audience=False)
    await queue.submit(job)
    attempt = await generator.begin(job)
    outbox = generator.running[job.id].outbox
    for _ in range(steps):
        generator.engine.step()
    await wait_until(lambda: outbox.hurries == (steps == 3))  # it knows when there is nothing more to come
    generator.end(job.id, StreamFenced("the lease was lost"))
    await attempt
    log = Transcript()
    for entry_id, entry in await streams.read(job.id):
        log.apply(entry_id, entry)
    assert log.terminal is None
    assert log.choices == {}
    await queue.cancel(job.id, Terminal("test"))


async def test_what_has_lost_a_part_of_its_log_is_not_gone_on_with(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams
) -> None:
    """It ends in the error that says so, and is no failure of the worker's."""
    generator = SteppedGenerator(streams, ScriptedEngine([70]))
    job = make_job(max_tokens=3, needs_audience=False)
    await queue.submit(job)
    await streams.begin(Writer(job.id, 1), "another worker")
    await streams.append([(job.id, "1-2", Delta([ChoiceDelta(0, 1, [70], "a")]))])
    await generator.run(job, 2)
    _, terminal = (await streams.read(job.id))[-1]
    assert isinstance(terminal, Terminal)
    assert terminal.error == REQUEST_LOST
    await queue.discard(job.id)


async def test_the_last_step_of_what_gives_way_is_appended_before_its_seal(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams
) -> None:
    """The step that was under way hands over the last token just when all before it has been appended."""
    engine = ScriptedEngine([70])
    generator = SteppedGenerator(streams, engine)
    job = make_job(max_tokens=2, job_class="batch", needs_audience=False)
    await queue.submit(job)
    attempt = await generator.begin(job)
    outbox = generator.running[job.id].outbox

    class Empty(asyncio.Event):
        """Those that wait hear of it after the engine's next step, if there is one."""

        def set(self) -> None:
            if engine.sequences:
                asyncio.get_running_loop().call_soon(engine.step)
            super().set()

    outbox.empty = Empty()
    engine.step()
    generator.running[job.id].give_way()
    sending = asyncio.create_task(generator.publisher.run())
    await asyncio.wait_for(attempt, 10)
    sending.cancel()
    log = Transcript()
    for entry_id, entry in await streams.read(job.id):
        log.apply(entry_id, entry)
    assert (log.choices[0].token_ids, log.choices[0].finish_reason) == ([70, 70], "length")
    assert log.terminal is not None
    assert log.terminal.usage is not None
    assert log.terminal.usage.completion_tokens == 2
    await queue.discard(job.id)


async def test_a_request_dropped_while_its_last_reply_is_in_doubt_harms_no_other(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams
) -> None:
    """An entry is refused, because an earlier send of it arrived; while the newest entry is read, to see
    whose it is, the request is dropped. The publisher goes on."""
    publisher = Publisher(streams)
    jobs = [make_job(needs_audience=False) for _ in range(2)]
    dropped, other = outboxes = [Outbox(Writer(job.id, 1), lambda ended: None) for job in jobs]
    for job, outbox in zip(jobs, outboxes, strict=True):
        await queue.submit(job)
        await streams.begin(outbox.writer, "worker")
    delta = ChoiceDelta(0, 0, [70], "a")
    await streams.append([(jobs[0].id, "1-1", Delta([delta]))])
    newest_id = streams.newest_id

    async def dropping(job_id: str) -> str | None:
        publisher.discard(dropped)
        return await newest_id(job_id)

    streams.newest_id = dropping
    running = asyncio.create_task(publisher.run())
    publisher.publish(dropped, [delta])
    publisher.publish(other, [delta])
    await asyncio.wait_for(other.empty.wait(), 10)
    publisher.publish(other, [ChoiceDelta(0, 1, [71], "b")])
    await asyncio.wait_for(other.empty.wait(), 10)
    assert await newest_id(jobs[1].id) == "1-2"
    running.cancel()
    for job in jobs:
        await queue.cancel(job.id, Terminal("test"))


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("written", [0, 1])
async def test_the_prompts_logprobs_are_in_the_stream_once_whoever_writes_them(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams, max_tokens: int, written: int
) -> None:
    """They go out with a choice's first token, in one entry. An attempt that ended before leaves them to the
    next; one that ended later has the next compute none."""
    job = make_job(
        "so", n=2, max_tokens=max_tokens, echo=True, top_logprobs=1, prompt_logprobs=1, needs_audience=False
    )
    await queue.submit(job)
    asked: list[int] = []
    for attempt in (1, 2):
        engine = ScriptedEngine([70, 71, 72])
        generator = SteppedGenerator(streams, engine)
        sending = asyncio.create_task(generator.publisher.run())
        run = await generator.begin(job, attempt)
        sampling = [request.sampling.prompt_logprobs for request, _ in engine.sequences.values()]
        asked.append(sum(each is not None for each in sampling))
        if attempt == 1:
            if written:
                engine.step()
                outbox = generator.running[job.id].outbox
                await asyncio.wait_for(outbox.empty.wait(), 10)
            generator.end(job.id, StreamFenced("the lease was lost"))
        while engine.step():
            pass
        await asyncio.wait_for(run, 10)
        sending.cancel()
    log = Transcript()
    entries = await streams.read(job.id)
    for entry_id, entry in entries:
        log.apply(entry_id, entry)
    assert log.terminal is not None
    assert log.terminal.error is None
    assert asked == ([2, 0] if written else [2, 2])
    prompt_ids = encode_prompt(generator.tokenizer, job.prompt)
    deltas = [each for _, entry in entries if isinstance(entry, Delta) for each in entry.choices]
    for index in range(2):
        of_choice = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in of_choice).startswith("so")
        logprobs = [each for delta in of_choice for each in delta.logprobs or ()]
        assert len(logprobs) == len(prompt_ids) + max_tokens
        of_prompt = logprobs[: len(prompt_ids)]
        assert [each.logprob for each in of_prompt] == [None, *(-float(i) for i in range(1, len(prompt_ids)))]
        assert of_prompt[0].width == 0, "the token that begins a text is no part of it"
        assert sum(each.width or 0 for each in of_prompt) == len("so")
        assert len(log.choices[index].token_ids) == max_tokens
    await queue.discard(job.id)


async def test_what_was_cached_of_a_prompt_counts_once(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams
) -> None:
    """As the first choice found it: those after it find what that one has computed. An attempt that goes on
    after another, of which the first choice was complete, says what the next one found."""

    class Caching(ScriptedEngine):
        def _advance(self, request: SequenceRequest, output_ids: list[int]) -> SequenceOutput:
            found = 3 + request.choice if len(output_ids) == len(request.output_ids) else 0
            return replace(super()._advance(request, output_ids), cached_tokens=found)

    async def cached_tokens(log: list[ChoiceDelta]) -> int:
        generator = SteppedGenerator(streams, Caching([70]))
        job = make_job(max_tokens=2, n=3, needs_audience=False)
        await queue.submit(job)
        if log:
            await streams.begin(Writer(job.id, 1), "worker")
            await streams.append([(job.id, "1-1", Delta(log))])
        sending = asyncio.create_task(generator.publisher.run())
        attempt = await generator.begin(job, 2)
        while generator.engine.step():
            pass
        await asyncio.wait_for(attempt, 10)
        sending.cancel()
        _, terminal = (await streams.read(job.id))[-1]
        assert isinstance(terminal, Terminal)
        assert terminal.usage is not None
        await queue.discard(job.id)
        return terminal.usage.cached_tokens

    assert await cached_tokens([]) == 3
    assert await cached_tokens([ChoiceDelta(0, 0, [70, 70], "aa", "length")]) == 4
