"""The token stream's protocol against a real server."""

from unittest.mock import ANY

import pytest
from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from llmboost import keys
from llmboost.entries import (
    GAP,
    REQUEST_LOST,
    ArqJob,
    ChoiceDelta,
    Delta,
    Entry,
    FollowUp,
    Once,
    Queued,
    StreamError,
    Terminal,
    Usage,
)
from llmboost.jobs import now
from llmboost.queue import JobQueue
from llmboost.streams import (
    SEAL_ID,
    SealOutcome,
    StreamFenced,
    StreamGone,
    StreamSealed,
    TokenStreams,
    Writer,
    persist,
)
from llmboost.transcript import StreamGap, Transcript
from tests.integration.workers import RETENTION_S
from tests.jobs import make_job

CANCELLED = Terminal("canceller", error=StreamError("cancelled"))


def delta(position: int, *token_ids: int, index: int = 0) -> Delta:
    return Delta([ChoiceDelta(index, position, list(token_ids), f"<{position}>")])


@pytest.fixture
async def job_id(queue: JobQueue) -> str:
    job = make_job()
    await queue.submit(job)
    yield job.id
    await queue.cancel(job.id, CANCELLED)


async def append(streams: TokenStreams, writer: Writer, entry: Entry, entry_id: str | None = None) -> str:
    """Appends as the publisher does; `entry_id` repeats an earlier send."""
    entry_id = entry_id or writer.next_id()
    [reply] = await streams.append([(writer.job_id, entry_id, entry)])
    await streams.check_reply(writer, entry_id, reply)
    return entry_id


async def token_ids(streams: TokenStreams, job_id: str) -> list[int]:
    transcript = Transcript()
    for entry_id, entry in await streams.read(job_id):
        transcript.apply(entry_id, entry)
    return transcript.choices[0].token_ids


async def test_an_attempt_reads_all_that_was_emitted_before_it(streams: TokenStreams, job_id: str) -> None:
    first = Writer(job_id, 1)
    assert (await streams.begin(first, "w1")).choices == {}
    await append(streams, first, delta(0, 10, 11))
    await append(streams, first, delta(2, 12))
    transcript = await streams.begin(Writer(job_id, 2), "w2")
    assert transcript.choices[0].token_ids == [10, 11, 12]


async def test_an_older_attempt_cannot_append_once_a_newer_one_has_begun(
    streams: TokenStreams, job_id: str
) -> None:
    first, second = Writer(job_id, 1), Writer(job_id, 2)
    await streams.begin(first, "w1")
    await append(streams, first, delta(0, 10))
    await streams.begin(second, "w2")
    with pytest.raises(StreamFenced):
        await append(streams, first, delta(1, 99))
    with pytest.raises(StreamFenced):
        await streams.begin(first, "w1")
    await append(streams, second, delta(1, 11))
    assert await token_ids(streams, job_id) == [10, 11]


async def test_an_entry_sent_again_after_a_lost_reply_is_there_once(
    streams: TokenStreams, job_id: str
) -> None:
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    entry_id = await append(streams, writer, delta(0, 10))
    await append(streams, writer, delta(0, 10), entry_id)
    assert await token_ids(streams, job_id) == [10]


async def test_beginning_again_after_a_lost_reply_is_no_fence_against_oneself(
    streams: TokenStreams, job_id: str
) -> None:
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    await streams.begin(writer, "w")
    await append(streams, writer, delta(0, 10))


async def test_an_append_does_not_bring_back_a_stream_that_is_gone(
    streams: TokenStreams, job_id: str
) -> None:
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    await streams.redis.delete(keys.stream(job_id))
    with pytest.raises(StreamGone):
        await append(streams, writer, delta(0, 10))
    with pytest.raises(StreamGone):
        await streams.begin(Writer(job_id, 2), "w")
    assert await streams.newest_id(job_id) is None


async def test_finding_a_stream_tells_its_form_and_whether_an_entry_is_there(
    streams: TokenStreams, queue: JobQueue
) -> None:
    """One look, before anyone joins: is it there, whose is it, and does it hold the place to go on from."""
    job = make_job(owner="somebody")
    await queue.submit(job, form=b"as asked")
    queued = Queued(job.model, "somebody", job.created, b"as asked")
    assert await streams.find(job.id, "0-1") == (queued, True)
    assert await streams.find(job.id, "1-1") == (queued, False)
    assert await streams.find("never-was", "0-1") == (None, False)
    await queue.cancel(job.id, CANCELLED)
    assert await streams.find(job.id, SEAL_ID) == (queued, True)


async def test_the_first_seal_wins_and_nothing_follows_it(streams: TokenStreams, job_id: str) -> None:
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    mine = Terminal("w/1")
    assert await streams.seal(job_id, CANCELLED) is SealOutcome.WRITTEN
    assert await streams.seal(job_id, mine, writer) is SealOutcome.SEALED
    with pytest.raises(StreamSealed):
        await append(streams, writer, delta(0, 10))
    with pytest.raises(StreamSealed):
        await streams.begin(Writer(job_id, 2), "w")
    *_, (_, last) = await streams.read(job_id)
    assert isinstance(last, Terminal)
    assert (last.by, last.error) == (CANCELLED.by, CANCELLED.error)


async def test_a_seal_says_when_it_was_made(streams: TokenStreams, job_id: str) -> None:
    """By the server's clock, whoever sealed; sealing again changes nothing."""
    before = now()
    assert await streams.seal(job_id, CANCELLED) is SealOutcome.WRITTEN
    *_, (_, first) = await streams.read(job_id)
    assert await streams.seal(job_id, CANCELLED) is SealOutcome.WRITTEN
    *_, (_, again) = await streams.read(job_id)
    assert isinstance(first, Terminal)
    assert first.at is not None
    assert before - 0.001 <= first.at <= now()
    assert again == first


async def test_a_sealer_whose_reply_was_lost_knows_its_own_entry(streams: TokenStreams, job_id: str) -> None:
    assert await streams.seal(job_id, CANCELLED) is SealOutcome.WRITTEN
    assert await streams.seal(job_id, CANCELLED) is SealOutcome.WRITTEN
    assert len(await streams.read(job_id)) == 2


async def test_what_follows_from_the_seal_is_done_by_whoever_seals_and_once(
    redis: ArqRedis, queue: JobQueue, streams: TokenStreams
) -> None:
    """The sealer knows nothing of it: the first entry has it. Sealing again, or in vain, does it no more."""
    job, once = make_job(), Once("llmboost:once::a", b"a")
    follow_up = FollowUp(retention=1000, push_to="sealed", job=ArqJob("arq:due", "told", b"definition"))
    await queue.submit(job, follow_up=follow_up, once=once)
    await queue.discard(job.id)
    assert not await redis.exists("sealed", "arq:due")
    for by in ("one", "one", "another"):
        await streams.seal(job.id, Terminal(by))
    assert await redis.lrange("sealed", 0, -1) == [job.id.encode()]
    assert await redis.zrange("arq:due", 0, -1) == [b"told"]
    assert await redis.get(keys.arq_job("told")) == b"definition"
    for name in (keys.stream(job.id), once.key):
        assert 999_000 < await redis.pttl(name) <= 1_000_000
    await redis.delete("arq:due")


async def test_an_attempt_that_was_taken_over_cannot_seal(streams: TokenStreams, job_id: str) -> None:
    first = Writer(job_id, 1)
    await streams.begin(first, "w1")
    second = Writer(job_id, 2)
    await streams.begin(second, "w2")
    assert await streams.seal(job_id, Terminal("w1/1"), first) is SealOutcome.FENCED
    await append(streams, second, delta(0, 10))
    assert await streams.seal(job_id, Terminal("w2/2"), second) is SealOutcome.WRITTEN


async def test_a_sealed_stream_stays_for_the_retention_and_leaves_the_indexes(
    redis: ArqRedis, streams: TokenStreams, job_id: str
) -> None:
    await streams.seal(job_id, CANCELLED)
    assert 0 < await redis.pttl(keys.stream(job_id)) <= RETENTION_S * 1000
    assert await redis.zscore(keys.OPEN, job_id) is None
    assert await streams.seal("no-such-stream", CANCELLED) is SealOutcome.GONE


async def test_a_log_with_a_missing_entry_is_refused(
    redis: ArqRedis, streams: TokenStreams, job_id: str
) -> None:
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    lost = await append(streams, writer, delta(0, 10))
    await append(streams, writer, delta(1, 11))
    await redis.xdel(keys.stream(job_id), lost)
    with pytest.raises(StreamGap, match="continues at token 1"):
        await streams.begin(Writer(job_id, 2), "w")


async def test_a_log_with_a_gap_is_read_as_one_that_ends_there_in_an_error(
    redis: ArqRedis, streams: TokenStreams, queue: JobQueue, job_id: str
) -> None:
    """Once it is sealed, however. A log that is read together with it is as it is."""
    other = make_job()
    await queue.submit(other)
    await queue.cancel(other.id, CANCELLED)
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    await append(streams, writer, delta(0, 10))
    whole = await streams.read(job_id)
    lost = await append(streams, writer, delta(1, 11))
    await append(streams, writer, delta(2, 12))
    await redis.xdel(keys.stream(job_id), lost)
    assert await streams.read(job_id) == whole
    await streams.seal(job_id, Terminal("w/1", Usage(1, 3)), writer)
    ended = [*whole, (SEAL_ID, Terminal("w/1", Usage(1, 3), GAP, at=ANY))]
    assert await streams.read(job_id) == ended
    assert await streams.read_each([job_id, "no-such-stream", other.id]) == [
        ended,
        [],
        await streams.read(other.id),
    ]


async def test_an_answer_whose_end_was_lost_does_not_end_well(
    redis: ArqRedis, streams: TokenStreams, job_id: str
) -> None:
    """Its writer has no more to append than the seal, and can't know that the server came back without what
    was before it."""
    writer = Writer(job_id, 1)
    await streams.begin(writer, "w")
    await append(streams, writer, delta(0, 10))
    await redis.xdel(keys.stream(job_id), await append(streams, writer, delta(1, 11)))
    assert await streams.seal(job_id, Terminal("w/1", Usage(1, 2)), writer) is SealOutcome.LOST
    assert (await streams.read(job_id))[-1] == (SEAL_ID, Terminal("w/1", error=REQUEST_LOST, at=ANY))


async def test_a_promise_of_an_audience_lapses_unless_renewed(streams: TokenStreams, job_id: str) -> None:
    assert (await streams.audience([job_id]))[0] <= 0
    assert await streams.renew_audience([job_id, "no-such-stream"], 5) == ["no-such-stream"]
    assert 4 < (await streams.audience([job_id]))[0] <= 5
    await streams.renew_audience([job_id], 1)
    assert (await streams.audience([job_id]))[0] > 4, "another reader's longer promise stands"
    await streams.seal(job_id, CANCELLED)
    await streams.renew_audience([job_id], 5)
    assert (await streams.audience([job_id]))[0] <= 0, "a sealed stream needs no audience"


async def test_only_failures_that_pass_are_tried_again() -> None:
    failures = [
        RedisConnectionError("reset"),
        ResponseError("LOADING Redis is loading the dataset in memory"),
        ResponseError("READONLY You can't write against a read only replica."),
    ]

    async def call() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert await persist(call, first=0.001) == "done"

    async def wrong() -> None:
        raise ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value")

    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await persist(wrong)
