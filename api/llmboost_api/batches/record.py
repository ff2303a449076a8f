"""What is known of a batch, and how a client sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import msgspec
from redis.asyncio import Redis

from llmboost import keys
from llmboost.jobs import is_id

ID_PREFIX = "batch_"

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ENDED: tuple[Status, ...] = ("failed", "completed", "expired", "cancelled")

_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was asked for; it does not change."""

    id: str
    owner: str
    """Fingerprint of the API key that made it; others can't see it."""
    input_file_id: str
    endpoint: str
    """Path of the endpoint that answers every line."""
    completion_window: str
    created: float
    """Unix time in seconds, as is `deadline`."""
    deadline: float
    """When what is not done is given up."""
    metadata: dict[str, str] | None = None
    output_life: int
    """Seconds for which the files that it makes are kept."""

    def encode(self) -> bytes:
        """As msgpack."""
        return _encoder.encode(self)


class Problem(msgspec.Struct, frozen=True):
    """Why a batch failed: one of OpenAI's batch errors."""

    code: str
    message: str
    line: int | None = None
    """Of the input, from 1."""
    param: str | None = None


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a batch is; Unix times in seconds, as the server of Redis has them."""

    status: Status
    total: int = 0
    """Lines; 0 until they have been validated."""
    completed: int = 0
    failed: int = 0
    """Expired and cancelled ones among them."""
    expired: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    model: str | None = None
    """If all lines ask for the same."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: str = ""
    """JSON: a list of `Problem`."""
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def all_done(self) -> bool:
        """The result of every line is in one of the parts."""
        return 0 < self.total <= self.completed + self.failed


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch at one moment."""

    record: BatchRecord
    progress: Progress

    @property
    def id(self) -> str:
        return self.record.id

    @classmethod
    def of(cls, fields: Mapping[bytes, bytes]) -> Batch | None:
        """From the hash in Redis; None if there is no such batch."""
        if b"record" not in fields:
            return None
        record = _decoder.decode(fields[b"record"])
        known = {name.decode(): value.decode() for name, value in fields.items() if name != b"record"}
        return cls(record, msgspec.convert(known, Progress, strict=False))

    def to_object(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        record, progress = self.record, self.progress
        errors = msgspec.json.decode(progress.errors) if progress.errors else None
        return {
            "id": record.id,
            "object": "batch",
            "endpoint": record.endpoint,
            "model": progress.model,
            "errors": None if errors is None else {"object": "list", "data": errors},
            "input_file_id": record.input_file_id,
            "completion_window": record.completion_window,
            "status": progress.status,
            "output_file_id": progress.output_file_id,
            "error_file_id": progress.error_file_id,
            "created_at": int(record.created),
            "expires_at": int(record.deadline),
            **{name: getattr(progress, name) for name in _TIMES},
            "request_counts": {
                "total": progress.total,
                "completed": progress.completed,
                "failed": progress.failed,
            },
            "usage": {
                "input_tokens": progress.prompt_tokens,
                "input_tokens_details": {"cached_tokens": progress.cached_tokens},
                "output_tokens": progress.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": progress.prompt_tokens + progress.completion_tokens,
            },
            "metadata": record.metadata,
        }


async def hash_of(redis: Redis, batch_id: str) -> dict[bytes, bytes]:
    """For `Batch.of`."""
    return await cast("Awaitable[dict[bytes, bytes]]", redis.hgetall(keys.batch(batch_id)))


def is_batch_id(text: str) -> bool:
    """Whether it was made here as the id of a batch."""
    return is_id(text, ID_PREFIX)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(BatchRecord)
