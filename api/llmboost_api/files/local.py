"""Objects on the disk of this machine, or on one that a network filesystem makes look like it.

fsspec's own atomic writes to the local disk go by way of the system's temporary folder, which may be on
another disk: then the move is a copy that a kill can cut short. So the disk is written to directly.
"""

import os
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

PART = ".part"
"""Ends the name of a file that is not whole yet."""


class LocalFolder:
    """A folder of files, one to an object."""

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
