"""What webhooks tell: that a background response or a batch has ended, and how."""

from collections.abc import Sequence
from typing import Literal

import msgspec

from llmboost.entries import Delta, ReadEntry, Terminal
from llmboost.jobs import derived_id

ResponseStatus = Literal["completed", "failed", "cancelled", "incomplete"]


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One end, told to every target in the same words each time."""

    id: str
    type: str
    created_at: int
    """Unix time (s) of the end."""
    subject: str
    """Id of what has ended."""

    @classmethod
    def of(cls, kind: Literal["response", "batch"], status: str, subject: str, ended_at: int) -> "Event":
        """The event of this end. Its id is made of the subject's, so it is the same whoever makes it."""
        name = f"{kind}.{status}"
        return cls(derived_id("evt_", subject, name), name, ended_at, subject)

    def body(self) -> bytes:
        """As OpenAI writes it."""
        return msgspec.json.encode(
            {
                "id": self.id,
                "object": "event",
                "created_at": self.created_at,
                "type": self.type,
                "data": {"id": self.subject},
            }
        )


def response_status(entries: Sequence[ReadEntry]) -> ResponseStatus | None:
    """How a response ended, from its whole stream; None if that is gone, or has not ended."""
    terminal = entries[-1][1] if entries else None
    if not isinstance(terminal, Terminal):
        return None
    if terminal.error is not None:
        return "cancelled" if terminal.error.code == "cancelled" else "failed"
    reasons = {
        choice.finish_reason for _, entry in entries if isinstance(entry, Delta) for choice in entry.choices
    }
    return "incomplete" if "length" in reasons else "completed"
