"""Several streams of one completion, read as one."""

import asyncio
from typing import Any, cast

import pytest

from llmboost.entries import ReadEntry
from llmboost.news import News
from llmboost_api.merge import Merge
from tests.waiting import suspended


class Stream:
    """A subscription that has what it is given."""

    def __init__(self, news: News) -> None:
        self._news = news
        self._batches: list[list[ReadEntry] | Exception] = []
        self._closes = False

    def give(self, batch: Any, *, last: bool = False) -> None:
        self._batches.append(batch)
        self._closes = last
        self._news.tell()

    @property
    def ready(self) -> bool:
        return bool(self._batches)

    @property
    def ended(self) -> bool:
        return self._closes and not self._batches

    def take(self) -> list[ReadEntry]:
        batch = self._batches[0]
        if isinstance(batch, Exception):
            raise batch
        return cast("list[ReadEntry]", self._batches.pop(0))


def merged(count: int) -> tuple[Merge, list[Stream]]:
    merge = Merge()
    streams = [Stream(merge.news) for _ in range(count)]
    for index, stream in enumerate(streams):
        merge.add(index, cast(Any, stream))
    return merge, streams


async def test_none_is_kept_out_by_another() -> None:
    merge, (busy, other) = merged(2)
    busy.give("a")
    busy.give("b")
    other.give("x")
    assert [await merge.next() for _ in range(3)] == [(0, "a"), (1, "x"), (0, "b")]


async def test_it_ends_when_all_have_ended() -> None:
    merge, (first, second) = merged(2)
    first.give("a", last=True)
    assert await merge.next() == (0, "a")
    waiting = asyncio.create_task(merge.next())
    await suspended(waiting)
    second.give("b", last=True)
    assert await waiting == (1, "b")
    with pytest.raises(StopAsyncIteration):
        await merge.next()


async def test_a_cancelled_wait_loses_nothing() -> None:
    merge, (stream,) = merged(1)
    waiting = asyncio.create_task(merge.next())
    await suspended(waiting)
    stream.give("a")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await merge.next() == (0, "a")


async def test_an_interruption_comes_after_what_is_there_and_stays() -> None:
    merge, (stream,) = merged(1)
    stream.give("a")
    merge.interrupt(RuntimeError("late"))
    assert await merge.next() == (0, "a")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="late"):
            await merge.next()


async def test_an_interruption_ends_a_wait() -> None:
    merge, _ = merged(2)
    waiting = asyncio.create_task(merge.next())
    await suspended(waiting)
    merge.interrupt(RuntimeError("late"))
    with pytest.raises(RuntimeError, match="late"):
        await waiting


async def test_a_failure_of_one_is_raised_again() -> None:
    """Whoever asks again must not wait for a stream that has failed."""
    merge, (stream, _) = merged(2)
    stream.give(ValueError("gap"))
    for _ in range(2):
        with pytest.raises(ValueError, match="gap"):
            await merge.next()
