"""Records of files: what is made known together is, and no place in a list is lost."""

import time

import pytest
from arq.connections import ArqRedis

from llmboost import keys
from llmboost.jobs import new_id
from llmboost.lua import Script
from llmboost_api.files.catalogue import PUBLISH_FILE, Catalogue, publication
from llmboost_api.files.record import FileRecord

EXPIRES_AT = int(time.time()) + 3600


@pytest.fixture
def catalogue(redis: ArqRedis) -> Catalogue:
    return Catalogue(redis)


def record(owner: str = "one", expires_at: int | None = EXPIRES_AT) -> FileRecord:
    return FileRecord(
        id=new_id("file"),
        bytes=1,
        created_at=1,
        filename="x",
        purpose="batch_output",
        owner=owner,
        expires_at=expires_at,
    )


async def ids(catalogue: Catalogue, after: str | None = None, *, newest_first: bool = False) -> list[str]:
    return [each.id async for each in catalogue.walk("one", after=after, newest_first=newest_first)]


async def test_several_files_are_made_known_in_one_step(redis: ArqRedis, catalogue: Catalogue) -> None:
    """By a script that makes something else known with them; each has a place of its own in the list."""
    both = Script(
        PUBLISH_FILE
        + """
redis.call('SET', KEYS[1], ARGV[1], 'PX', 1000)
publish_file(KEYS[2], KEYS[3], KEYS[4], unpack(ARGV, 2, 5))
publish_file(KEYS[5], KEYS[6], KEYS[7], unpack(ARGV, 6, 9))
"""
    )
    first, second = record(), record(expires_at=None)
    (first_keys, first_args), (second_keys, second_args) = publication(first), publication(second)
    for _ in range(2):  # an unknown outcome is asked for again
        await both(redis, ["other", *first_keys, *second_keys], ["done", *first_args, *second_args])
    assert await redis.get("other") == b"done"
    assert await catalogue.get("one", first.id) == first
    assert await catalogue.get("one", second.id) == second
    assert await ids(catalogue) == [first.id, second.id]
    assert await ids(catalogue, first.id) == [second.id]
    assert await ids(catalogue, second.id, newest_first=True) == [first.id]
    assert abs(await redis.pttl(keys.file(first.id)) - (EXPIRES_AT - time.time()) * 1000) < 10_000
    assert await redis.zrange(keys.FILES_DUE, 0, -1) == [f"one:{first.id}".encode()]


async def test_a_deleted_file_still_names_its_place(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long before its end its upload had begun."""
    early = record()
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: EXPIRES_AT - 10)
        others = [record(), record()]
    for each in (others[0], early, others[1]):
        await catalogue.publish(each)
    for _ in range(2):  # an unknown outcome is asked for again
        await catalogue.remove(early)
    await catalogue.publish(early)
    assert await catalogue.get("one", early.id) is None
    assert await ids(catalogue) == [others[0].id, others[1].id]
    assert await ids(catalogue, early.id) == [others[1].id]
    assert await ids(catalogue, early.id, newest_first=True) == [others[0].id]


async def test_a_file_long_gone_names_the_second_of_its_making(catalogue: Catalogue) -> None:
    known, gone = record(), record()
    await catalogue.publish(known)
    assert await ids(catalogue, gone.id, newest_first=True) in ([known.id], [])
    with pytest.raises(ValueError, match="no id"):
        await ids(catalogue, "file-1")


async def test_what_was_published_is_not_swept_as_abandoned(redis: ArqRedis, catalogue: Catalogue) -> None:
    stays, expires, abandoned = record(expires_at=None), record(), record()
    for each in (stays, expires, abandoned):
        await catalogue.reserve("one", each.id)
        assert await catalogue.remove_due() == []
    await catalogue.publish(stays)
    await catalogue.publish(expires)
    due = dict(await redis.zrange(keys.FILES_DUE, 0, -1, withscores=True))
    assert due[f"one:{expires.id}".encode()] == EXPIRES_AT * 1000
    assert due.keys() == {f"one:{expires.id}".encode(), f"one:{abandoned.id}".encode()}
    await redis.zadd(keys.FILES_DUE, {f"one:{abandoned.id}": 1})
    assert await catalogue.remove_due() == [("one", abandoned.id)]
    assert await catalogue.remove_due() == [("one", abandoned.id)]  # until its bytes are said to be gone
    await catalogue.forget("one", abandoned.id)
    assert await catalogue.remove_due() == []
    assert await ids(catalogue) == [stays.id, expires.id]


async def test_others_see_nothing(catalogue: Catalogue) -> None:
    mine, theirs = record(), record(owner="two")
    await catalogue.publish(mine)
    await catalogue.publish(theirs)
    assert await catalogue.get("one", theirs.id) is None
    assert await ids(catalogue) == [mine.id]
