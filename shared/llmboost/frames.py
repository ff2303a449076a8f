"""Ids of the frames that a stream's entries make for a client, who can go on after any of them."""

import re
from dataclasses import dataclass

_NUMBER = "(?:0|[1-9][0-9]{0,15})"
_FRAME_ID = re.compile(f"({_NUMBER}-{_NUMBER})(?:[.]([1-9][0-9]{{0,5}}))?")


@dataclass(frozen=True, slots=True)
class Cursor:
    """How much of a stream a client has had: all up to an entry, or up to a few frames into it."""

    entry_id: str
    frames: int | None = None
    """So many of the frames that the entry makes; None: all."""

    @classmethod
    def parse(cls, frame_id: str) -> "Cursor | None":
        """The cursor after a frame; None if that is not the id of one."""
        match = _FRAME_ID.fullmatch(frame_id)
        return match and cls(match[1], int(match[2]) if match[2] else None)


def frame_ids(entry_id: str, count: int) -> list[str]:
    """Ids of the frames that one entry makes for a client, who can go on after any of them.

    The last has the entry's own, `2-7`; those before it say how many have been had: `2-7.1`, `2-7.2`.
    """
    return [*(f"{entry_id}.{had}" for had in range(1, count)), entry_id]
