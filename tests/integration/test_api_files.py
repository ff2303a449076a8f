"""Files, by the official client: two pods that share a storage, asked in turn."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from arq.connections import ArqRedis
from openai import InternalServerError, NotFoundError
from redis.exceptions import ConnectionError as RedisConnectionError

from llmboost import keys
from llmboost.jobs import new_id, now
from llmboost_api import patience
from llmboost_api.connections import ClientConnection
from llmboost_api.files.catalogue import PAGE
from llmboost_api.files.record import FileRecord
from tests.waiting import wait_until

from .api_pod import RunningPod, serving, settings_for
from .file_pods import LINES, LONG, MIB, files_of, nothing_left, pod, pods, upload
from .storages import files_url, left_in, s3_endpoint

__all__ = ["files_url", "pod", "pods", "s3_endpoint"]


async def test_the_life_of_a_file(pods: Iterator[RunningPod], files_url: str) -> None:
    made = await upload(next(pods).openai)
    assert made.object == "file"
    assert made.id.startswith("file-")
    assert (made.bytes, made.filename, made.purpose) == (len(LINES), "input.jsonl", "user_data")
    assert (made.status, made.status_details, made.expires_at) == ("processed", None, None)
    for _ in range(2):
        assert await next(pods).openai.files.retrieve(made.id) == made
        content = await next(pods).openai.files.content(made.id)
        assert content.content == LINES
        assert content.response.headers["content-type"] == "application/octet-stream"
        assert content.response.headers["content-length"] == str(len(LINES))
        assert content.response.headers["content-disposition"] == 'attachment; filename="input.jsonl"'
    assert (await next(pods).openai.files.list()).data == [made]
    deleted = await next(pods).openai.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    for call in ("retrieve", "content", "delete"):
        with pytest.raises(NotFoundError, match=made.id):
            await getattr(next(pods).openai.files, call)(made.id)
    assert (await next(pods).openai.files.list()).data == []
    assert left_in(files_url) == []


@pytest.mark.parametrize("size", [0, 1, 33 * MIB + 1])
async def test_files_of_any_size(pods: Iterator[RunningPod], size: int) -> None:
    data = os.urandom(size)
    made = await upload(next(pods).openai, data)
    assert made.bytes == size
    assert (await next(pods).openai.files.content(made.id)).content == data
    await next(pods).openai.files.delete(made.id)


# Names and owners


@pytest.mark.parametrize(
    ("name", "disposition"),
    [
        ("naïve 文.jsonl", "attachment; filename*=utf-8''na%C3%AFve%20%E6%96%87.jsonl"),
        ("../../etc/passwd", "attachment; filename*=utf-8''..%2F..%2Fetc%2Fpasswd"),
        ("x" * 255, f'attachment; filename="{"x" * 255}"'),
    ],
)
async def test_a_name_is_only_a_name(pod: RunningPod, name: str, disposition: str) -> None:
    """Whatever stands in it, the file lies under its id, and the name comes back as it was given."""
    made = await upload(pod.openai, name=name)
    assert made.filename == name
    assert (await pod.openai.files.retrieve(made.id)).filename == name
    content = await pod.openai.files.content(made.id)
    assert content.content == LINES
    assert content.response.headers["content-disposition"] == disposition
    assert await files_of(pod).storage.size(made.id) == len(LINES)


async def test_files_belong_to_the_key_that_made_them(
    redis: ArqRedis, redis_url: str, tmp_path: Path
) -> None:
    settings = settings_for(redis_url, files_url=str(tmp_path), api_key=("one", "two"))
    async with serving(settings) as pod:
        first, second = pod.openai.copy(api_key="one"), pod.openai.copy(api_key="two")
        made = await upload(first)
        for call in ("retrieve", "content", "delete"):
            with pytest.raises(NotFoundError, match="only the API key that made it"):
                await getattr(second.files, call)(made.id)
        assert (await second.files.list()).data == []
        assert (await first.files.list()).data == [made]
        assert (await first.files.content(made.id)).content == LINES
        assert (await pod.http.get("/v1/files")).status_code == 401
        assert (await pod.http.post("/v1/files")).status_code == 401


@pytest.mark.parametrize("file_id", ["file-1", "file-", "nothing", "chatcmpl-1", "file-é", "*"])
async def test_an_id_that_is_none(pod: RunningPod, file_id: str) -> None:
    for call in ("retrieve", "content", "delete"):
        with pytest.raises(NotFoundError) as error:
            await getattr(pod.openai.files, call)(file_id)
        assert error.value.code == "file_not_found"
        assert error.value.param == "file_id"


# Lists


async def test_lists_page_by_page(pods: Iterator[RunningPod]) -> None:
    """In the order of their making, without a gap or a repetition, whichever pod is asked for a page."""
    made = [
        await upload(next(pods).openai, name=f"{number}", purpose=("user_data", "batch")[number % 2])
        for number in range(7)
    ]
    newest = made[::-1]
    everything = await next(pods).openai.files.list()
    assert (everything.data, everything.has_more) == (newest, False)
    raw = (await next(pods).http.get("/v1/files", params={"limit": 3})).json()
    assert raw["object"] == "list"
    assert (raw["first_id"], raw["last_id"], raw["has_more"]) == (newest[0].id, newest[2].id, True)
    assert raw["data"] == [each.model_dump(mode="json") for each in newest[:3]]
    for limit in (1, 2, 3, 7, 8):
        assert [each async for each in next(pods).openai.files.list(limit=limit)] == newest
        assert [each async for each in next(pods).openai.files.list(limit=limit, order="asc")] == made
    batches = next(pods).openai.files.list(purpose="batch", limit=2)
    assert [each async for each in batches] == [each for each in newest if each.purpose == "batch"]
    rest = await next(pods).openai.files.list(after=newest[4].id)
    assert (rest.data, rest.has_more) == (newest[5:], False)
    nothing = await next(pods).openai.files.list(purpose="evals")
    assert (nothing.data, nothing.has_more) == ([], False)


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_whoever_pages_may_delete_what_it_has_seen(
    pods: Iterator[RunningPod], order: Literal["asc", "desc"]
) -> None:
    made = [(await upload(next(pods).openai)).id for _ in range(5)]
    seen = []
    async for file in next(pods).openai.files.list(limit=2, order=order):
        seen.append(file.id)
        await next(pods).openai.files.delete(file.id)
    assert seen == (made if order == "asc" else made[::-1])
    assert (await next(pods).openai.files.list()).data == []


async def test_a_long_list(pod: RunningPod) -> None:
    """Longer than what is read from Redis at once, with files in it that are gone."""
    files = files_of(pod)
    count = 2 * PAGE + 10
    records = [
        FileRecord(id=new_id("file"), bytes=1, created_at=1, filename="x", purpose="evals", owner="")
        for _ in range(count)
    ]
    for record in records:
        await files.publish(record)
    for record in records[5 : PAGE + 5]:
        await files.catalogue.remove(record)
    left = [record.id for record in (*records[:5], *records[PAGE + 5 :])]
    page, more = await files.page("", after=None, limit=10_000, newest_first=False, purpose=None)
    assert ([record.id for record in page], more) == (left, False)
    page, more = await files.page("", after=None, limit=len(left) - 1, newest_first=True, purpose="evals")
    assert ([record.id for record in page], more) == (left[:0:-1], True)


@pytest.mark.parametrize(
    ("query", "param", "words"),
    [
        ("limit=0", "limit", "at least 1"),
        ("limit=10001", "limit", "at most 10000"),
        ("limit=99999999999999999999", "limit", "at most 10000"),
        ("limit=x", "limit", '"x"'),
        ("limit=²", "limit", '"²"'),
        ("limit=", "limit", '""'),
        ("order=up", "order", "'asc' or 'desc'"),
        ("after=file-1", "after", "the id of a file"),
        ("befor=1", "befor", "not a parameter"),
    ],
)
async def test_a_wrong_parameter_of_a_list(pod: RunningPod, query: str, param: str, words: str) -> None:
    response = await pod.http.get(f"/v1/files?{query}")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


# The end of a file


async def test_when_a_file_expires(pod: RunningPod) -> None:
    made = await upload(pod.openai, expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    of_a_batch = await upload(pod.openai, purpose="batch")
    assert of_a_batch.expires_at == of_a_batch.created_at + 30 * 24 * 3600
    soon = await upload(pod.openai, purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200})
    assert soon.expires_at == soon.created_at + 7200


async def test_an_expired_file_is_gone(pods: Iterator[RunningPod], redis: ArqRedis, files_url: str) -> None:
    """In time even if no pod sweeps; its bytes, and its place in the list, with the next sweep of any."""

    async def chunks() -> AsyncIterator[bytes]:
        yield LINES

    pod = next(pods)
    files = files_of(pod)
    stays = await upload(pod.openai)
    record = await files.create("", "x", "user_data", chunks(), life_s=2)
    assert (await pod.openai.files.retrieve(record.id)).expires_at == record.expires_at
    await wait_until(lambda: gone(next(pods), record.id))
    assert now() >= (record.expires_at or 0)
    assert [each.id for each in (await next(pods).openai.files.list()).data] == [stays.id]
    assert sum(await asyncio.gather(files.sweep(), files_of(next(pods)).sweep())) >= 1
    (left,) = left_in(files_url)
    assert left.endswith(stays.id)
    assert await redis.zrange(keys.files(""), 0, -1) == [stays.id.encode()]
    assert await redis.zcard(keys.FILES_DUE) == 0


async def gone(pod: RunningPod, file_id: str) -> bool:
    return (await pod.http.get(f"/v1/files/{file_id}")).status_code == 404


async def test_bytes_that_are_lost_are_said_to_be(pod: RunningPod) -> None:
    made = await upload(pod.openai)
    await files_of(pod).storage.delete(made.id)
    with pytest.raises(InternalServerError, match="Upload it again") as error:
        await pod.openai.files.content(made.id)
    assert error.value.code == "file_lost"
    await pod.openai.files.delete(made.id)


# What is left


async def test_a_killed_pod_leaves_nothing_that_is_seen(
    pods: Iterator[RunningPod], redis: ArqRedis, files_url: str
) -> None:
    """What its upload has written goes with a sweep, some time after."""
    files = files_of(next(pods))
    draft = files.draft("")  # whose block never ends
    await draft.write(LONG)
    assert (await next(pods).openai.files.list()).data == []
    assert await files.sweep() == 0
    await redis.zadd(keys.FILES_DUE, {f":{draft.id}": 1}, xx=True)
    assert await files_of(next(pods)).sweep() == 1
    await nothing_left(redis, files_url)
    await draft.__aexit__(EOFError, None, None)


async def test_bytes_whose_record_is_not_made_go_by_themselves(
    pod: RunningPod, redis: ArqRedis, files_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis may have heard of the file, so its bytes stay as long as that isn't known."""
    files = files_of(pod)

    async def fail(record: FileRecord) -> None:
        raise RedisConnectionError("away")

    monkeypatch.setattr(files.catalogue, "publish", fail)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    with pytest.raises(InternalServerError):
        await upload(pod.openai.with_options(max_retries=0))
    ((member, _),) = await redis.zrange(keys.FILES_DUE, 0, -1, withscores=True)
    (left,) = left_in(files_url)
    assert left.endswith(member.decode().removeprefix(":"))
    await redis.zadd(keys.FILES_DUE, {member: 1})
    assert await files.sweep() == 1
    await nothing_left(redis, files_url)


# A storage that fails


class AwayFolder:
    """One that can't be reached, whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        return self.begin if name == "begin" else self.fail

    def begin(self, name: str) -> "AwayFolder":
        return self

    def fail(self, *_: object) -> None:
        raise OSError("it is away")


async def test_a_storage_that_is_away(
    pod: RunningPod, redis: ArqRedis, monkeypatch: pytest.MonkeyPatch, files_url: str
) -> None:
    """503 for what needs it, and the pod lives on; what was to be removed is removed when it comes back."""
    made = await upload(pod.openai)
    files = files_of(pod)

    with monkeypatch.context() as away:
        away.setattr(files.storage, "_folder", AwayFolder())
        client = pod.openai.with_options(max_retries=0)
        for call in (upload(client), client.files.content(made.id)):
            with pytest.raises(InternalServerError, match="storage of files") as error:
                await call
            assert error.value.status_code == 503
            assert error.value.response.headers["retry-after"]
        assert await client.files.retrieve(made.id) == made
        assert (await client.files.list()).data == [made]
        await client.files.delete(made.id)
        assert await gone(pod, made.id)
    for member in await redis.zrange(keys.FILES_DUE, 0, -1):
        await redis.zadd(keys.FILES_DUE, {member: 1})
    await files.sweep()
    await nothing_left(redis, files_url)


async def test_a_slow_storage_is_not_the_clients_fault(
    redis: ArqRedis, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time that an upload has to arrive does not pass while the pod takes nothing of it."""
    settings = settings_for(redis_url, files_url=str(tmp_path), receive_timeout=0.5)
    looks = 0
    look = ClientConnection._on_late

    def counted(connection: ClientConnection) -> None:
        nonlocal looks
        looks += 1
        look(connection)

    monkeypatch.setattr(ClientConnection, "_on_late", counted)
    async with serving(settings) as pod:
        storage = files_of(pod).storage
        write = storage.run

        async def slow(*arguments: Any) -> Any:
            await wait_until(lambda: looks > 1)
            return await write(*arguments)

        monkeypatch.setattr(storage, "run", slow)
        made = await upload(pod.openai.with_options(max_retries=0), LONG)
        assert made.bytes == len(LONG)
