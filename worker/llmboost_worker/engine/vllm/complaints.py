"""How vLLM's processes say what is wrong, for which vLLM has no way: a datagram socket.

`drawing` complains of a sequence that can't go on, before the step's tokens are sent: whoever has a token and
finds no complaint knows that there was none. What vLLM logs as an error, such as why a model can't be loaded,
comes this way too, and not only into a log.
"""

import contextlib
import logging
import os
import socket
from pathlib import Path

import msgspec

PATH = "LLMBOOST_VLLM_COMPLAINTS"
"""The environment variable by which vLLM's processes find the socket."""

EVERYONE = ""
"""In a sequence's stead: the process itself is in trouble."""


class Complaint(msgspec.Struct, frozen=True, array_like=True):
    """What a datagram holds."""

    id: str
    """Of the sequence, or `EVERYONE`."""
    reason: str
    is_refused: bool = False
    """The sequence can't go on because of what was asked."""


class Inbox:
    """The engine's end, in a folder of the engine's."""

    def __init__(self, folder: Path) -> None:
        path = str(folder / "complaints")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path)
        self._socket.setblocking(False)
        os.environ[PATH] = path
        self._of: dict[str, Complaint | None] = {}
        """By the ids of live sequences."""
        self._trouble: str | None = None

    def expect(self, id: str) -> None:
        """From now on complaints of this sequence count."""
        self._of[id] = None

    def forget(self, id: str) -> None:
        """They don't any more."""
        self._of.pop(id, None)

    def complaint(self, id: str) -> Complaint | None:
        """What is wrong with a sequence."""
        self._take()
        return self._of.get(id)

    @property
    def trouble(self) -> str | None:
        """The first error that a process of vLLM's has logged: the others follow from it."""
        self._take()
        return self._trouble

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # nothing there, or closed
            while True:
                complaint = msgspec.msgpack.decode(self._socket.recv(65536), type=Complaint)
                if complaint.id == EVERYONE:
                    self._trouble = self._trouble or complaint.reason
                elif complaint.id in self._of:
                    self._of[complaint.id] = complaint

    def close(self) -> None:
        """Takes what has come, and nothing more."""
        self._take()
        self._socket.close()


class Outbox(logging.Handler):
    """The end in vLLM's process; as a handler, of errors that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._path = os.environ[PATH]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # complaints are few; one that doesn't fit is not worth a wait

    def send(self, id: str, reason: str, is_refused: bool = False) -> None:
        complaint = Complaint(id, reason[:4096], is_refused)
        with contextlib.suppress(OSError):  # its reader has gone, and this process will
            self._socket.sendto(msgspec.msgpack.encode(complaint), self._path)

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.send(EVERYONE, f"{type(error).__name__}: {error}" if error else record.getMessage())
