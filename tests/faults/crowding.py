"""What a crowded machine costs, as Linux counts it: a test adds it to the times that a contract has in it."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class Crowding:
    """How long processes have wanted cores that others had, from now on."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._before = {pid: _waited(pid) for pid in pids}
        self._latest = dict(self._before)

    def look(self) -> float:
        """Seconds until now, of all threads of the process that has waited most; of one that has ended, as it
        was when this was called last."""
        for pid in self._before:
            self._latest[pid] = max(self._latest[pid], _waited(pid))
        return max(self._latest[pid] - before for pid, before in self._before.items())


def _waited(pid: int) -> float:
    """The second figure of `/proc/<pid>/task/<tid>/schedstat`: ns spent waiting on a run queue."""
    nanoseconds = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError, IndexError):  # it may end meanwhile
            nanoseconds += int(thread.read_text().split()[1])
    return nanoseconds / 1e9
