"""What webhooks tell: that a background response or a batch has ended, and how."""

from typing import Literal

import msgspec

from llmboost.jobs import derived_id


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
