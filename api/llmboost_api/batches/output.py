"""Results as OpenAI writes them: a row of JSON for each line, gathered into objects of some size."""

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from llmboost.entries import Usage
from llmboost.jobs import derived_id
from llmboost_api.answer import add_usage
from llmboost_api.batches.holding import Part, Results
from llmboost_api.protocol.shape import encode_json

ROWS = 256
BYTES = 4 * 1024 * 1024
"""As many rows, or bytes of them, are written at once, though there be more to come."""


class Ending(Enum):
    """Why a line was not run: (OpenAI's code, message)."""

    EXPIRED = (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    )
    CANCELLED = ("batch_cancelled", "This request was not executed, because its batch was cancelled.")

    @property
    def code(self) -> str:
        return self.value[0]

    @property
    def message(self) -> str:
        return self.value[1]


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one line."""

    number: int
    data: bytes
    """JSON, with a line break."""
    ending: Ending | None = None
    failed: bool = False
    usage: Usage | None = None
    streams: tuple[str, ...] = ()
    """Ids of those that are of no more use once the row is committed."""


class RowWriter:
    """Writes the rows of one batch."""

    def __init__(self, batch_id: str) -> None:
        self._batch_id = batch_id

    def response(self, number: int, custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
        """The row of a line that was answered, be it with an error. `body`: JSON."""
        response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
        return self._row(number, custom_id, response, None)

    def not_run(self, number: int, custom_id: str, why: Ending) -> bytes:
        """The row of a line that was not answered."""
        return self._row(number, custom_id, None, {"code": why.code, "message": why.message})

    def _row(self, number: int, custom_id: str, response: object, error: object) -> bytes:
        row = {
            "id": derived_id("batch_req_", self._batch_id, number),
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        return encode_json(row) + b"\n"


@dataclass(frozen=True, slots=True)
class Written:
    """Rows on their way into a batch: the objects to write, and what their commit says."""

    rows: list[Row]
    objects: dict[str, bytes]
    results: Results


@dataclass(slots=True)
class Rows:
    """Rows that are not written yet."""

    rows: list[Row] = field(default_factory=list)
    size: int = 0

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def full(self) -> bool:
        """There are as many as are written at once."""
        return len(self.rows) >= ROWS or self.size >= BYTES

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.size += len(row.data)

    def take(self, name: str) -> Written:
        """All of them; `name` is what their objects' names begin with."""
        rows, self.rows, self.size = self.rows, [], 0
        objects, parts = {}, []
        for failed, kind in ((False, "output"), (True, "error")):
            data = b"".join(row.data for row in rows if row.failed == failed)
            if data:
                part = Part(f"{name}-{kind}", failed)
                objects[part.name] = data
                parts.append(part)
        usage = Usage(0, 0)
        for row in rows:
            usage = add_usage(usage, row.usage)
        failures = sum(row.failed for row in rows)
        results = Results(
            parts,
            [row.number for row in rows],
            completed=len(rows) - failures,
            failed=failures,
            expired=sum(row.ending is Ending.EXPIRED for row in rows),
            usage=usage,
        )
        return Written(rows, objects, results)
