"""Where objects can be kept, with nothing async about it: what a folder does, and which one a URL names."""

import os
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llmboost_api.files.local import LocalFolder
from llmboost_api.files.remote import RemoteFolder


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
