"""News: told by anyone, taken by one task."""

import asyncio

import pytest

from llmboost.news import News
from tests.waiting import suspended


async def test_what_came_before_is_not_waited_for() -> None:
    news = News()
    news.tell()
    await news.wait()


async def test_several_words_are_one_piece_of_news() -> None:
    news = News()
    news.tell()
    news.tell()
    await news.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(news.wait(), 0.01)


async def test_a_wait_ends_when_it_is_told() -> None:
    news = News()
    waiting = asyncio.create_task(news.wait())
    await suspended(waiting)
    news.tell()
    news.tell()
    await waiting


async def test_a_cancelled_wait_loses_nothing() -> None:
    news = News()
    waiting = asyncio.create_task(news.wait())
    await suspended(waiting)
    news.tell()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await news.wait()
