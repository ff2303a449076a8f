"""The server, asked over HTTP; while it is away it is asked again."""

import itertools
import random
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from llmboost.cli.batch.options import ServerOptions

T = TypeVar("T")

_TIMEOUT_S, _CONNECT_TIMEOUT_S = 60.0, 10.0
"""Of one read or write, not of a whole transfer."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0
_AWAY = (408, 429, 502, 503, 504)
"""Statuses that pass."""
_STUBBORN = 5
"""So often a server may fail in a way of its own (500) in a row."""
ENDED = ("completed", "failed", "expired", "cancelled")


class ServerError(Exception):
    """The server refused or failed; `str()` says why. `status`: its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NoServer(Exception):
    """Nothing answers; `str()` says why."""


class Counts(msgspec.Struct, frozen=True):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Problem(msgspec.Struct, frozen=True):
    """What is wrong with an input."""

    message: str = ""
    line: int | None = None


class Problems(msgspec.Struct, frozen=True):
    data: list[Problem] | None = None


class Batch(msgspec.Struct, frozen=True):
    """What is read of a batch object."""

    id: str
    status: str
    request_counts: Counts | None = None
    errors: Problems | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def counts(self) -> Counts:
        return self.request_counts or Counts()

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class _File(msgspec.Struct):
    id: str


class Server:
    """A server with OpenAI's files and batches.

    `on_wait` is called with the reason before each pause while the server is away; it may raise. Nothing else
    limits how long it is waited for.
    """

    def __init__(self, options: ServerOptions, on_wait: Callable[[str], None]) -> None:
        self.options = options
        self.on_wait = on_wait
        headers = {"user-agent": "llmboost"}
        if options.api_key:
            headers["authorization"] = f"Bearer {options.api_key}"
        self._http = httpx.Client(
            base_url=options.url,
            headers=headers,
            timeout=httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            follow_redirects=True,
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def check(self) -> None:
        """Finds out whether it is there, and takes the key.

        Raises:
            NoServer: nothing listens there.
            ServerError: it refuses.
        """
        try:
            _taken(self._http.get("/models"))
        except httpx.TransportError as error:
            raise NoServer(str(error) or type(error).__name__) from None
        except ServerError as error:
            if error.status not in _AWAY:
                raise

    def upload(self, name: str, file: BinaryIO) -> str:
        """Sends a file of requests; returns its id."""
        key = str(uuid.uuid4())

        def send() -> httpx.Response:
            file.seek(0)
            return self._http.post(
                "/files",
                data={"purpose": "batch"},
                files={"file": (name, file, "application/jsonl")},
                headers={"idempotency-key": key},
            )

        return _decoded(self._asked(send), _File).id

    def create(self, file_id: str, endpoint: str, window: str, metadata: dict[str, str]) -> Batch:
        """Begins a batch; once, however often this has to be sent."""
        body: dict[str, Any] = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": window}
        if metadata:
            body["metadata"] = metadata
        headers = {"idempotency-key": str(uuid.uuid4())}
        return _decoded(self._asked(lambda: self._http.post("/batches", json=body, headers=headers)), Batch)

    def retrieve(self, batch_id: str) -> Batch:
        """How far a batch is."""
        return _decoded(self._look(batch_id), Batch)

    def describe(self, batch_id: str) -> dict[str, Any]:
        """The same, in all the server's words."""
        return _decoded(self._look(batch_id), dict)

    def _look(self, batch_id: str) -> httpx.Response:
        return self._asked(lambda: self._http.get(f"/batches/{quote(batch_id, safe='')}"))

    def cancel(self, batch_id: str) -> Batch:
        """Ends a batch early."""
        path = f"/batches/{quote(batch_id, safe='')}/cancel"
        return _decoded(self._asked(lambda: self._http.post(path)), Batch)

    def download(self, file_id: str, into: BinaryIO) -> None:
        """Writes a file's content, all of it."""

        def fetch() -> httpx.Response:
            into.seek(0)
            into.truncate()
            with self._http.stream("GET", f"/files/{file_id}/content") as response:
                if response.is_error:
                    response.read()
                else:
                    for part in response.iter_bytes():
                        into.write(part)
            return response

        self._asked(fetch)

    def _asked(self, ask: Callable[[], httpx.Response]) -> httpx.Response:
        """Asks until there is an answer.

        Raises:
            ServerError: the answer is a refusal.
        """
        stubborn = 0
        for attempt in itertools.count():
            after = 0.0
            try:
                return _taken(response := ask())
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            except ServerError as error:
                stubborn += error.status not in _AWAY
                if stubborn == _STUBBORN or not _passes(response):
                    raise
                reason, after = str(error), _retry_after(response)
            self.on_wait(reason)
            pause = min(_FIRST_PAUSE_S * 2 ** min(attempt, 10), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)
            time.sleep(max(pause, min(after, 60.0)))
        raise AssertionError


def _decoded(response: httpx.Response, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        asked = f"{response.request.method} {response.request.url.path}"
        raise ServerError(f"{asked} is answered in a way that is not OpenAI's: {error}", 502) from None


def _taken(response: httpx.Response) -> httpx.Response:
    if not response.is_error:
        return response
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200].strip() or response.reason_phrase
    raise ServerError(f"{message} (status {response.status_code})", response.status_code)


def _passes(response: httpx.Response) -> bool:
    if response.headers.get("x-should-retry") == "false":
        return False
    return response.status_code in _AWAY or response.status_code >= 500


def _retry_after(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers.get("retry-after", 0)))
    except ValueError:
        return 0.0
