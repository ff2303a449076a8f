"""A worker, whole but for its model: claims, generates, publishes, hands over, seals."""

import asyncio
import time

from arq.connections import ArqRedis

from llmboost import keys
from llmboost.connection import serialize
from llmboost.entries import ChoiceDelta, Delta, Started, StreamError, Terminal, Usage
from llmboost.jobs import GenerationJob, Prompt
from llmboost.queue import JobQueue
from llmboost.registry import Registry
from llmboost.streams import TokenStreams, Writer
from llmboost_worker.audience import AudienceWatch
from llmboost_worker.text import Tokenizer, encode_prompt
from tests.integration.deaths import begin, die
from tests.integration.workers import (
    GRACE_S,
    LEASE_S,
    StartWorker,
    emitted,
    ended,
    expected_ids,
    ids,
    running,
    step_until,
    submit,
    text,
    transcript,
)
from tests.jobs import MODEL, make_job
from tests.unit.text_tokenizers import byte_level
from tests.waiting import wait_until


async def test_a_job_becomes_a_sealed_stream(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    worker = await start_worker()
    job = await submit(queue)
    await running(worker)
    await step_until(worker, lambda: not worker.engine.sequences)
    terminal = await ended(streams, job)
    expected = expected_ids(job, worker, tokenizer, 12)
    log = await transcript(streams, job)
    assert log.choices[0].token_ids == expected
    assert log.choices[0].finish_reason == "length"
    assert await text(streams, job) == tokenizer.decode(expected)
    assert terminal.usage == Usage(len(encode_prompt(tokenizer, job.prompt)), 12)
    assert terminal.error is None


async def test_nothing_of_a_finished_job_stays_but_its_stream(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    worker = await start_worker()
    job = await submit(queue, max_tokens=1)
    await running(worker)
    worker.engine.step()
    await ended(streams, job)
    await wait_until(lambda: not worker.process.arq.claims and not worker.process.arq.tasks)
    left = {key.decode() async for key in redis.scan_iter("*") if job.id.encode() in key}
    assert left == {keys.stream(job.id)}
    assert worker.process._generator.running == {}


async def test_choices_are_independent_and_carry_their_own_finish(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    worker = await start_worker()
    eos = worker.engine.info.eos_token_ids[0]
    draw = worker.engine.script
    worker.engine.script = lambda request, position: (
        eos if request.choice == 1 and position == 3 else draw(request, position)
    )
    job = await submit(queue, n=3, max_tokens=6)
    await running(worker, 3)
    await step_until(worker, lambda: not worker.engine.sequences)
    terminal = await ended(streams, job)
    choices = (await transcript(streams, job)).choices
    assert [choices[i].finish_reason for i in range(3)] == ["length", "stop", "length"]
    assert len({tuple(choice.token_ids) for choice in choices.values()}) == 3
    assert terminal.usage is not None
    assert terminal.usage.completion_tokens == 6 + 4 + 6


async def test_a_stop_string_ends_the_choice_and_frees_its_slot(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    worker = await start_worker()
    sentence = ids(tokenizer, "one two STOP three four")
    worker.engine.script = lambda request, position: sentence[position]
    job = await submit(queue, stop=("STOP",), max_tokens=100)
    await running(worker)
    await step_until(worker, lambda: not worker.engine.sequences)
    await ended(streams, job)
    assert await text(streams, job) == "one two "
    assert (await transcript(streams, job)).choices[0].finish_reason == "stop"


async def test_another_worker_continues_where_the_first_was_told_to_go(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis, tokenizer: Tokenizer
) -> None:
    """The stream holds the tokens of an unbroken run, and the hand-over costs no try."""
    first = await start_worker()
    job = await submit(queue)
    await running(first)
    await step_until(first, lambda: emitted(streams, job, 5))
    second = await start_worker()
    await first.terminate()
    await running(second)
    assert not await redis.hexists(keys.claim(job.id), "deaths")
    await step_until(second, lambda: not second.engine.sequences)
    await ended(streams, job)
    log = await transcript(streams, job)
    assert log.choices[0].token_ids == expected_ids(job, first, tokenizer, 12)
    assert await text(streams, job) == tokenizer.decode(log.choices[0].token_ids)
    assert sum(isinstance(entry, Started) for _, entry in await streams.read(job.id)) == 2


async def test_a_worker_that_was_taken_over_writes_nothing_more(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    """The zombie's lease lapsed while it was frozen; thawed, it drops the sequence at its next append."""
    zombie = await start_worker()
    job = await submit(queue)
    await running(zombie)
    await step_until(zombie, lambda: emitted(streams, job, 3))
    other = Writer(job.id, 7)
    log = await streams.begin(other, "other")
    before = len(await streams.read(job.id))
    await step_until(zombie, lambda: not zombie.engine.sequences)
    await wait_until(lambda: not zombie.process._generator.running)
    assert len(await streams.read(job.id)) == before
    assert (await transcript(streams, job)).choices[0].token_ids == log.choices[0].token_ids


async def test_a_cancelled_request_frees_its_slot_at_the_next_append(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    worker = await start_worker()
    job = await submit(queue, max_tokens=900)
    await running(worker)
    await queue.cancel(job.id, Terminal("client", error=StreamError("cancelled")))
    await step_until(worker, lambda: not worker.engine.sequences)
    assert (await ended(streams, job)).by == "client"


async def test_a_stream_that_nobody_reads_is_sealed_within_the_grace(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    worker = await start_worker()
    job = make_job(max_tokens=900)
    await queue.submit(job, audience=GRACE_S)
    read = make_job(max_tokens=900)
    await queue.submit(read, audience=60)
    await running(worker, 2)
    await wait_until(lambda: len(worker.engine.sequences) == 1)
    terminal = await ended(streams, job)
    assert terminal.error is not None
    assert terminal.error.code == "client_gone"
    assert (await transcript(streams, read)).terminal is None


async def test_a_job_that_nobody_waits_for_any_more_is_not_run_until_the_next_round(
    queue: JobQueue, streams: TokenStreams
) -> None:
    """A queue full of what clients have left would cost a round each."""
    job, ends = make_job(max_tokens=900), list[str]()
    watch = AudienceWatch(streams, 600.0, "w", running=list, end=lambda job_id, _: ends.append(job_id))
    await queue.submit(job, audience=0.001)

    async def has_lapsed() -> bool:
        return (await streams.audience([job.id]))[0] < 0

    await wait_until(has_lapsed)
    task = asyncio.create_task(watch.run())
    watch.add(job)
    terminal = await ended(streams, job)
    task.cancel()
    assert terminal.error is not None
    assert terminal.error.code == "client_gone"
    await queue.discard(job.id)


async def test_readers_are_not_gone_because_the_machine_stood_still(
    queue: JobQueue, streams: TokenStreams
) -> None:
    """No pod could renew its promises either; it does as soon as it runs again."""
    job, rounds, ends = make_job(max_tokens=900), list[int](), list[str]()

    def running() -> list[GenerationJob]:
        rounds.append(1)
        return [job]

    watch = AudienceWatch(streams, 1.0, "w", running, end=lambda job_id, _: ends.append(job_id))
    await queue.submit(job, audience=0.3)
    task = asyncio.create_task(watch.run())
    await wait_until(lambda: rounds)
    before = len(rounds)
    asyncio.get_running_loop().call_soon(time.sleep, 0.5)  # all of this process
    await wait_until(lambda: len(rounds) > before)
    await streams.renew_audience([job.id], 60)
    await wait_until(lambda: len(rounds) > before + 1)
    task.cancel()
    assert not ends
    assert (await transcript(streams, job)).terminal is None
    await queue.cancel(job.id, Terminal("test"))


async def test_a_prompt_over_the_context_is_refused_with_both_lengths(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    await start_worker()
    job = await submit(queue, text="x y " * 1200)
    terminal = await ended(streams, job)
    assert terminal.error is not None
    assert (terminal.error.status, terminal.error.code) == (400, "context_length_exceeded")
    tokens = len(encode_prompt(byte_level(), job.prompt))
    assert "1000 tokens" in terminal.error.message
    assert f"{tokens} tokens" in terminal.error.message


async def test_a_prompt_that_cannot_be_encoded_fails_alone(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    worker = await start_worker()
    good = await submit(queue)
    bad = await submit(queue, prompt=Prompt(token_ids=[10**6]))
    terminal = await ended(streams, bad)
    assert terminal.error is not None
    assert terminal.error.status == 400
    await running(worker)
    await step_until(worker, lambda: not worker.engine.sequences)
    assert (await ended(streams, good)).error is None


async def test_a_bias_outside_the_vocabulary_is_the_clients_error(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    await start_worker()
    job = await submit(queue, logit_bias={10**6: 1.0})
    error = (await ended(streams, job)).error
    assert error is not None
    assert (error.status, error.param) == (400, "logit_bias")


async def test_a_sequence_that_fails_in_the_engine_ends_its_request_alone(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    worker = await start_worker()
    bad, good = await submit(queue, n=2), await submit(queue)
    await running(worker, 3)
    worker.engine.failing = {next(s for s in worker.engine.sequences if s.startswith(bad.id))}
    await step_until(worker, lambda: not worker.engine.sequences)
    error = (await ended(streams, bad)).error
    assert error is not None
    assert error.message == "scripted failure"
    assert (await ended(streams, good)).error is None


async def test_an_echo_of_no_tokens_is_the_rendered_prompt(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams
) -> None:
    await start_worker()
    messages = [{"role": "user", "content": "hi"}]
    job = await submit(queue, prompt=Prompt(messages=messages), echo=True, max_tokens=0)
    await ended(streams, job)
    assert await text(streams, job) == "<|user|>hi<|end|><|assistant|>"


async def test_jobs_that_are_unreadable_unknown_or_lost_end_visibly(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    jobs = [make_job(needs_audience=False) for _ in range(3)]
    for job in jobs:
        await queue.submit(job)
    unreadable, unknown, lost = jobs
    await redis.set(keys.arq_job(unreadable.id), b"\xc1", ex=60)
    strange = {"t": None, "f": "no such function", "a": (), "k": {}, "et": 0}
    await redis.set(keys.arq_job(unknown.id), serialize(strange), ex=60)
    await redis.delete(keys.arq_job(lost.id))
    await start_worker()
    for job, code in ((unreadable, "job_failed"), (unknown, "job_failed"), (lost, "request_lost")):
        terminal = await ended(streams, job)
        assert terminal.error is not None
        assert terminal.error.code == code


async def test_a_request_that_used_up_its_tries_ends_visibly(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, redis: ArqRedis
) -> None:
    job = await submit(queue)
    claims = await queue.claim(MODEL, 1, "dead", LEASE_S)
    await begin(queue, claims)
    await die(queue, claims, max_tries=1)
    worker = await start_worker()
    terminal = await ended(streams, job)
    assert terminal.error is not None
    assert terminal.error.code == "tries_used_up"
    await wait_until(lambda: not worker.process.arq.claims)
    assert [key async for key in redis.scan_iter("*") if job.id.encode() in key] == [
        keys.stream(job.id).encode()
    ]


async def test_a_job_of_a_dead_worker_is_taken_over(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    job = await submit(queue)
    [claim] = await queue.claim(MODEL, 1, "dead", 0.05)
    dead = Writer(job.id, claim.attempt)
    await streams.begin(dead, "dead")
    worker = await start_worker()
    await running(worker)
    await step_until(worker, lambda: not worker.engine.sequences)
    await ended(streams, job)
    log = await transcript(streams, job)
    assert log.choices[0].token_ids == expected_ids(job, worker, tokenizer, 12)


async def test_a_worker_says_what_it_serves_until_it_goes(start_worker: StartWorker, redis: ArqRedis) -> None:
    registry = Registry(redis)
    worker = await start_worker()
    [card] = await wait_until(registry.workers)
    assert [card.name for card in await registry.models()] == [MODEL]
    assert (card.model, card.max_num_seqs) == (MODEL, 8)
    await worker.terminate()
    assert await registry.workers() == []
    assert await registry.model(MODEL) is not None, "its name is accepted while it may come back"


async def test_many_jobs_share_the_worker_and_none_is_lost(
    start_worker: StartWorker, queue: JobQueue, streams: TokenStreams, tokenizer: Tokenizer
) -> None:
    """More jobs than slots, on two workers that step by themselves."""
    workers = [await start_worker(), await start_worker()]
    jobs = [await submit(queue, text=f"prompt {i}") for i in range(60)]
    for worker in workers:
        worker.engine.run(interval=0.001)
    for job in jobs:
        assert (await ended(streams, job)).error is None
        log = await transcript(streams, job)
        assert log.choices[0].token_ids == expected_ids(job, workers[0], tokenizer, 12)


def test_deltas_of_several_steps_share_an_entry_in_order() -> None:
    from llmboost_worker.publisher import Outbox

    outbox = Outbox(Writer("job", 1), on_end=lambda ended: None)
    first, second = ChoiceDelta(0, 0, [1], "a"), ChoiceDelta(0, 1, [2], "b")
    outbox.pending.extend([Delta([first], 5), Delta([second])])
    entry_id, delta = outbox.take()
    assert delta == Delta([first, second], 5)
    outbox.pending.append(Delta([ChoiceDelta(0, 2, [3], "c")]))
    assert outbox.take() == (entry_id, delta), "an entry whose outcome is unknown is sent again unchanged"
