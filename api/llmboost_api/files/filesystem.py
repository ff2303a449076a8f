"""Folders that hold objects, with nothing async about them: the local disk, and all that fsspec knows.

fsspec's own atomic writes to the local disk go by way of the system's temporary folder, which may be on
another disk: then the move is a copy that a kill can cut short. So the local disk is written to directly.
"""

import os
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

PART = ".part"
"""Ends the name of a file that is not whole yet."""
BLOCK_BYTES = 8 * 1024 * 1024
"""One part of an upload to S3, which takes from 5 MiB to 5 GiB and 10,000 of them; held in memory."""


class PartialObject(Protocol):
    """An object in the making. May be called from several threads, one after another or at once."""

    def write(self, data: bytes | bytearray) -> None:
        """Adds to it."""

    def commit(self) -> None:
        """Makes it visible under its name, whole; an older object of that name is replaced."""

    def abort(self) -> None:
        """Leaves nothing of it, even if it was committed."""


class Folder(Protocol):
    """Objects by name. Missing ones raise `FileNotFoundError`, other failures what the filesystem raises."""

    url: str

    def check(self) -> None:
        """Writes and removes an object."""

    def is_away(self, error: Exception) -> bool:
        """Whether a failure may pass: the folder can't be reached, which says nothing of what is there."""

    def begin(self, name: str) -> PartialObject:
        """A new object; nothing is done before its first write or its commit."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """A part of an object that has so many bytes."""

    def size(self, name: str) -> int:
        """Bytes of an object."""

    def delete(self, name: str) -> None:
        """Removes an object; there may be none."""

    def discard(self, name: str) -> None:
        """Removes an object, and every partial one of that name."""

    def delete_all(self, prefix: str) -> None:
        """Removes every object below a name."""

    def list(self, prefix: str) -> list[str]:
        """Names of all objects below a name, sorted."""

    def sweep(self, older_than: float) -> None:
        """Removes partial objects to which nothing was added for so many seconds."""


def open_folder(url: str) -> Folder:
    """The folder at a URL. Nothing is written yet.

    Raises:
        ValueError: there is no such kind of folder, or its package is missing.
    """
    shown = _without_password(url)
    if "://" not in url:  # `~` is the home folder, as in a shell
        return LocalFolder(Path(os.path.expanduser(url)).absolute())
    scheme = url.partition("://")[0]
    try:
        # Another pod writes too, so nothing that was seen may be remembered.
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = "pip install 'llmboost[s3]'" if scheme in ("s3", "s3a") else str(error)
        raise ValueError(f"--files-url {shown!r} needs a package that is missing: {extra}") from None
    except ValueError as error:
        raise ValueError(
            f"--files-url {shown!r}: {error}. Give a local folder, or s3://bucket/prefix."
        ) from None
    if isinstance(filesystem, LocalFileSystem):
        return LocalFolder(Path(path))
    if not path.strip("/"):
        raise ValueError(f"--files-url {shown!r} names no bucket: write s3://bucket/prefix")
    return RemoteFolder(filesystem, path.rstrip("/"), shown)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


class LocalFolder:
    """A folder of this machine, or one that a network filesystem makes look like it."""

    def __init__(self, root: Path) -> None:
        self.url = str(root)
        self._root = root

    def check(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = self.begin("check")
        try:
            probe.write(b"ok")
        finally:
            probe.abort()

    def is_away(self, error: Exception) -> bool:
        return False

    def begin(self, name: str) -> "_LocalPartial":
        return _LocalPartial(self._root / name)

    def read(self, name: str, start: int, end: int) -> bytes:
        with open(self._root / name, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def size(self, name: str) -> int:
        path = self._root / name
        if path.is_dir():
            raise FileNotFoundError(f"{name} is a folder")
        return path.stat().st_size

    def delete(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)

    def discard(self, name: str) -> None:
        path = self._root / name
        for part in path.parent.glob(f"{path.name}.*{PART}"):
            part.unlink(missing_ok=True)
        self.delete(name)

    def delete_all(self, prefix: str) -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(self._root / prefix)

    def list(self, prefix: str) -> list[str]:
        return sorted(
            str(path.relative_to(self._root))
            for path in self._root.joinpath(prefix).rglob("*")
            if path.suffix != PART and path.is_file()
        )

    def sweep(self, older_than: float) -> None:
        before = time.time() - older_than
        for path in self._root.rglob(f"*{PART}"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()


class _LocalPartial:
    """A file beside its place, moved there when it is whole: on one disk, a move is all or nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Two writers of one name must not write into the same file.
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._ended = self._committed = False

    def write(self, data: bytes | bytearray) -> None:
        with self._lock:
            self._open().write(data)

    def commit(self) -> None:
        with self._lock:
            with self._open() as file:
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._part, self._path)
            self._ended = self._committed = True

    def abort(self) -> None:
        with self._lock:
            self._ended = True
            if self._file is not None:
                self._file.close()
            (self._path if self._committed else self._part).unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        if self._ended:
            raise OSError("the object was given up")
        if self._file is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self._part.open("xb")
        return self._file


class RemoteFolder:
    """A folder behind one of fsspec's filesystems: one that shows an object only when it is whole."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self.url = url
        self._filesystem = filesystem
        self._root = root

    def check(self) -> None:
        probe = self.begin(f"check-{secrets.token_hex(8)}")
        try:
            probe.write(b"ok")
            probe.commit()
        finally:
            probe.abort()

    def is_away(self, error: Exception) -> bool:
        if isinstance(error, OSError):
            return not isinstance(error, FileNotFoundError | PermissionError)
        # botocore's own have no base outside it, and it may not be installed.
        return any(kind.__name__ in ("HTTPClientError", "ConnectionError") for kind in type(error).__mro__)

    def begin(self, name: str) -> "_RemotePartial":
        return _RemotePartial(self._filesystem, self._path(name))

    def read(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._filesystem.cat_file(self._path(name), start=start, end=end))

    def size(self, name: str) -> int:
        info = self._filesystem.info(self._path(name))
        if info["type"] != "file":
            raise FileNotFoundError(f"{name} is a folder")
        return int(info["size"])

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path(name))

    def discard(self, name: str) -> None:
        if hasattr(self._filesystem, "abort_mpu"):  # S3
            self._abort_uploads(name)
        self.delete(name)

    def _abort_uploads(self, name: str) -> None:
        bucket, key, _ = self._filesystem.split_path(self._path(name))
        found = self._filesystem.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key)
        for upload in found.get("Uploads", []):
            if upload["Key"] == key:
                self._filesystem.abort_mpu(bucket, key, upload["UploadId"])

    def delete_all(self, prefix: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.rm(self._path(prefix), recursive=True)

    def list(self, prefix: str) -> list[str]:
        try:
            found = self._filesystem.find(self._path(prefix))
        except FileNotFoundError:
            return []
        return sorted(path.removeprefix(f"{self._root}/") for path in found)

    def sweep(self, older_than: float) -> None:
        """Nothing: an upload that was begun and not ended is the bucket's to remove, by a lifecycle rule."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _RemotePartial:
    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._lock = threading.Lock()
        self._file: Any = None
        self._ended = self._committed = False

    def write(self, data: bytes | bytearray) -> None:
        with self._lock:
            self._open().write(data)

    def commit(self) -> None:
        with self._lock:
            file = self._open()
            file.close()
            file.commit()
            self._ended = self._committed = True

    def abort(self) -> None:
        with self._lock:
            self._ended = True
            if self._committed:
                with suppress(FileNotFoundError):
                    self._filesystem.rm_file(self._path)
            elif self._file is not None:
                self._file.closed = True  # or its destructor would write what is left
                self._file.discard()

    def _open(self) -> Any:
        if self._ended:
            raise OSError("the object was given up")
        if self._file is None:
            self._file = self._filesystem.open(
                self._path, "wb", autocommit=False, block_size=BLOCK_BYTES, cache_type="none"
            )
        return self._file
