"""What is known of a file, and how a client sees it."""

from typing import Any

import msgspec

ID_PREFIX = "file"
BATCH_OUTPUT = "batch_output"
"""Purpose of what a batch writes; no client may give it."""


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file. Its bytes are in the storage, under its id."""

    id: str
    bytes: int
    created_at: int
    """Unix time in seconds, as is `expires_at`."""
    filename: str
    """As the client called it: text, never a path."""
    purpose: str
    owner: str
    """Fingerprint of the API key that made it; others can't see it."""
    expires_at: int | None = None
    """None: it stays until it is deleted."""
    status: str = "processed"

    def to_object(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": self.status,
            "status_details": None,
        }


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FileRecord)


def encode(record: FileRecord) -> bytes:
    """The record as msgpack."""
    return _encoder.encode(record)


def decode(data: bytes) -> FileRecord:
    """A record from `encode`."""
    return _decoder.decode(data)
