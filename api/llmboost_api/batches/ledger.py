"""What one runner has under way for one batch: lines in flight, rows not committed, and whether to go on."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llmboost.entries import StreamError, Terminal
from llmboost_api.batches.output import Ending, Row, Rows
from llmboost_api.batches.record import Problem


@dataclass(slots=True, eq=False)
class InFlight:
    """A line that was made into jobs. Its body is not kept: it can be read again."""

    number: int
    offset: int
    """In the input."""
    custom_id: str
    completion_id: str
    jobs: tuple[str, ...]
    """Their ids, and those of their streams."""
    open: set[str] = field(default_factory=set)
    """Those that are not known to be sealed."""
    submitted: bool = False
    """All of them."""


class Ledger:
    """Shared by the tasks that work on a batch. Whatever changes in it wakes those that wait for a change."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.fed = False
        """Nothing more will be begun."""
        self.ending: Ending | None = None
        """Why lines that have not begun will not be run."""
        self.problem: Problem | None = None
        """Why the batch can't be run to its end."""
        self._lines: dict[int, InFlight] = {}
        self._by_job: dict[str, InFlight] = {}
        self._changed = asyncio.Event()

    # Waiting

    def changed(self) -> None:
        """Something has."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until it holds."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    @property
    def drained(self) -> bool:
        """All that will ever be a row is one."""
        return self.fed and not self._lines

    # Lines in flight

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(list(self._lines.values()))

    def begin(self, line: InFlight) -> None:
        """One more."""
        self._lines[line.number] = line
        line.open.update(line.jobs)
        self._by_job.update(dict.fromkeys(line.jobs, line))
        self.changed()

    def of_job(self, job_id: str) -> InFlight | None:
        """The line of a job; None if it is not in flight (any more)."""
        return self._by_job.get(job_id)

    def end(self, line: InFlight) -> None:
        """It is in flight no more."""
        del self._lines[line.number]
        for job_id in line.jobs:
            del self._by_job[job_id]
        self.changed()

    def add(self, row: Row) -> None:
        """A result."""
        self.rows.add(row)
        self.changed()


def terminal_of(ending: Ending, by: str) -> Terminal:
    """How the stream of a line ends that is given up."""
    return Terminal(by, error=StreamError(ending.message, "batch_error", ending.code, status=499))
