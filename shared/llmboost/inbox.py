"""What a subscription of the tailer holds between a read and its reader: contiguous, and bounded."""

from llmboost.entries import FIELD, RawEntry
from llmboost.streams import BEGINNING, SEAL_ID, position

ENTRIES = 256
BYTES = 256 * 1024
"""Entries, and bytes of them, beyond which a subscription is not read for; one read may overshoot."""

_SEAL_ID = SEAL_ID.encode()


class Inbox:
    """What was read for one subscription and not yet taken by it: contiguous, and bounded."""

    __slots__ = ("closed", "cursor", "entries", "size")

    def __init__(self) -> None:
        self.cursor = BEGINNING.encode()
        """Id of the newest entry that was accepted."""
        self.entries: list[RawEntry] = []
        self.size = 0
        self.closed = False
        """Nothing more is wanted."""

    @property
    def hungry(self) -> bool:
        """Whether more should be read for it."""
        return not self.closed and len(self.entries) < ENTRIES and self.size < BYTES

    def accept(self, entries: list[RawEntry], read_after: bytes) -> bool:
        """Takes what follows its cursor from a read of the stream after another; false if nothing does."""
        if not self.hungry:
            return False
        if self.cursor != read_after:
            mine = position(self.cursor)
            if mine < position(read_after):
                return False  # It joined after this read was sent, from further back: the next one is for it.
            entries = [entry for entry in entries if position(entry[0]) > mine]
            if not entries:
                return False
        self.entries.extend(entries)
        self.size += sum(len(fields.get(FIELD, b"")) for _, fields in entries)
        self.cursor = entries[-1][0]
        self.closed = self.cursor == _SEAL_ID
        return True

    def take(self) -> list[RawEntry]:
        """Empties it."""
        entries, self.entries, self.size = self.entries, [], 0
        return entries
