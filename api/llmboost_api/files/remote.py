"""Objects behind one of fsspec's filesystems: S3, or another that shows an object only when it is whole."""

import secrets
import threading
from contextlib import suppress
from typing import Any

BLOCK_BYTES = 8 * 1024 * 1024
"""One part of an upload to S3, which takes from 5 MiB to 5 GiB and 10,000 of them; held in memory."""


class RemoteFolder:
    """A bucket, or a part of one."""

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
