"""Objects are there whole or not at all, wherever they are kept."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llmboost_api.files.remote import BLOCK_BYTES
from llmboost_api.files.storage import READ_BYTES, FileStorage, NoSuchObject, StorageError

from .storages import S3_ENVIRONMENT, files_url, left_in, s3_endpoint

__all__ = ["files_url", "s3_endpoint"]

LARGE = os.urandom(1 << 16) * ((2 * BLOCK_BYTES + 12345) // (1 << 16))


@pytest.fixture
async def storage(files_url: str) -> AsyncIterator[FileStorage]:
    storage = FileStorage(files_url)
    storage.check()
    yield storage
    storage.close()


async def content(storage: FileStorage, name: str, offset: int = 0) -> bytes:
    return b"".join([piece async for piece in storage.read(name, offset)])


async def give_up(storage: FileStorage, data: bytes) -> None:
    """Writes it, and fails before the end."""
    with contextlib.suppress(EOFError):
        async with storage.write("file-1") as writer:
            await writer.write(data)
            raise EOFError


@pytest.mark.parametrize("data", [b"", b"x", LARGE], ids=["empty", "small", "large"])
async def test_what_is_written_is_read(storage: FileStorage, data: bytes) -> None:
    async with storage.write("file-1") as writer:
        for start in range(0, len(data), 100_000):
            await writer.write(data[start : start + 100_000])
        assert not await storage.exists("file-1")
    assert await storage.size("file-1") == writer.size == len(data)
    assert await content(storage, "file-1") == data
    if data:
        assert await content(storage, "file-1", len(data) - 1) == data[-1:]
        assert await content(storage, "file-1", len(data) // 2) == data[len(data) // 2 :]
    assert await content(storage, "file-1", len(data)) == b""
    assert await storage.list("file-1") in ([], ["file-1"])


@pytest.mark.parametrize("data", [b"", b"x", LARGE], ids=["empty", "small", "large"])
async def test_what_is_given_up_was_never_there(storage: FileStorage, data: bytes, files_url: str) -> None:
    await give_up(storage, data)
    assert not await storage.exists("file-1")
    assert left_in(files_url) == []


async def test_what_is_given_up_leaves_the_older_one(storage: FileStorage) -> None:
    await storage.put("file-1", b"old")
    await give_up(storage, LARGE)
    assert await content(storage, "file-1") == b"old"
    await storage.put("file-1", b"new")
    assert await content(storage, "file-1") == b"new"


async def test_a_cancelled_writer_leaves_nothing(storage: FileStorage, files_url: str) -> None:
    async def write_on() -> None:
        async with storage.write("file-1") as writer:
            while True:
                await writer.write(LARGE)
                started.set()

    started = asyncio.Event()
    task = asyncio.create_task(write_on())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left_in(files_url) == []


async def test_a_commit_that_nobody_waits_for_is_undone(storage: FileStorage, files_url: str) -> None:
    writer = storage.write("file-1")
    await writer.write(b"x")
    await writer.commit()
    assert await writer.abort()
    assert left_in(files_url) == []
    with pytest.raises(StorageError):
        await writer.commit()


async def test_objects_by_their_beginning(storage: FileStorage) -> None:
    for name in ("batch-1/b", "batch-1/a", "batch-1/c/d", "batch-10/a", "file-1"):
        await storage.put(name, name.encode())
    assert await storage.list("batch-1") == ["batch-1/a", "batch-1/b", "batch-1/c/d"]
    assert await storage.concat(await storage.list("batch-1"), "file-2") == 29
    assert await content(storage, "file-2") == b"batch-1/abatch-1/bbatch-1/c/d"
    await storage.delete_all("batch-1")
    assert await storage.list("batch-1") == []
    await storage.delete_all("batch-1")
    assert await storage.list("batch-10") == ["batch-10/a"]
    with pytest.raises(NoSuchObject):
        await storage.concat(["batch-10/a", "batch-1/a"], "file-3")
    assert not await storage.exists("file-3")


async def test_an_object_that_is_not_there(storage: FileStorage) -> None:
    with pytest.raises(NoSuchObject):
        await content(storage, "file-1")
    await storage.put("batch-1/a", b"")
    assert not await storage.exists("batch-1")
    await storage.delete("file-1")


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "..", "a/../../b", "a//b", "a\n", ".part", "a.part", "a/", "é"]
)
async def test_a_name_that_is_none(storage: FileStorage, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        await storage.put(name, b"x")
    with pytest.raises(ValueError, match="no name"):
        await content(storage, name)


async def test_lines_of_any_length(storage: FileStorage) -> None:
    """Whatever the pieces in which they are read; a line that is too long costs no memory."""
    texts = [b"x" * size for size in (0, 1, 999, 1000, 1001, READ_BYTES - 1, 0, 3 * READ_BYTES, 5)]
    await storage.put("file-1", b"\n".join(texts))
    lines = [line async for line in storage.lines("file-1", max_bytes=1000)]
    assert [line.data for line in lines] == [text if len(text) <= 1000 else None for text in texts]
    assert [line.number for line in lines] == list(range(1, len(texts) + 1))
    assert [line.end - line.offset for line in lines] == [len(text) + 1 for text in texts[:-1]] + [5]
    for line in lines:
        rest = [
            each
            async for each in storage.lines("file-1", offset=line.end, number=line.number + 1, max_bytes=1000)
        ]
        assert rest == lines[line.number :]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [b""]),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\r\nb", [b"a", b"b"]),
        (b"a\rb\n\n", [b"a\rb", b""]),
        (b"12345\r\n123456\r\n", [b"12345", None]),
    ],
)
async def test_line_breaks(storage: FileStorage, data: bytes, lines: list[bytes | None]) -> None:
    await storage.put("file-1", data)
    assert [line.data async for line in storage.lines("file-1", max_bytes=5)] == lines


async def test_what_killed_writers_leave_is_discarded(storage: FileStorage, files_url: str) -> None:
    """And nothing of others whose names begin alike."""
    writers = [storage.write(name) for name in ("file-1", "file-1", "file-11")]
    for writer in writers:
        await writer.write(LARGE)
    await storage.put("file-1", b"x")
    await storage.discard("file-1")
    (left,) = left_in(files_url)
    assert "file-11" in left
    await storage.discard("file-1")
    for writer in writers:
        await writer.abort()
    assert left_in(files_url) == []


async def test_what_killed_writers_leave_is_swept(tmp_path: Path) -> None:
    storage = FileStorage(str(tmp_path))
    await storage.write("batch-1/a").write(LARGE)
    await storage.sweep(3600)
    parts = left_in(str(tmp_path / "batch-1"))
    assert len(parts) == 1
    assert await storage.list("batch-1") == []
    os.utime(tmp_path / "batch-1" / parts[0], (1, 1))
    await storage.sweep(3600)
    assert left_in(str(tmp_path / "batch-1")) == []
    storage.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nowhere://x/y", "Protocol not known: nowhere"),
        ("s3://", "names no bucket"),
    ],
)
def test_a_url_that_is_none(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FileStorage(url)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"pip install 'llmboost\[s3\]'"):
        FileStorage("s3://bucket/prefix")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="files can't be kept in"):
        FileStorage(str(tmp_path / "file" / "folder")).check()


def test_a_bucket_that_does_not_exist(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": s3_endpoint}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="files can't be kept in"):
        FileStorage("s3://no-such-bucket/x").check()
