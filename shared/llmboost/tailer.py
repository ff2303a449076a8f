"""Tails many token streams over one connection, for an API pod or an SDK client.

Interface agreed; see the class docstrings.
"""

from types import TracebackType

from llmboost.entries import ReadEntry
from llmboost.streams import BEGINNING, TokenStreams


class Subscription:
    """One reader of one stream: an async context manager, and an async iterator over batches of entries.

    Each batch holds the entries that have come since the last one, in order, at least one. Iteration ends
    after the batch that holds the terminal entry.

    Raises (from iteration):
        StreamGone: the stream no longer exists, or never did.
        StreamGap: an entry is missing.
    """

    async def __aenter__(self) -> "Subscription":
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError

    def __aiter__(self) -> "Subscription":
        return self

    async def __anext__(self) -> list[ReadEntry]:
        raise NotImplementedError


class Tailer:
    """One per process; `async with Tailer(...) as tailer:` runs it."""

    def __init__(self, streams: TokenStreams, *, redis_url: str, grace: float) -> None:
        """`grace`: seconds for which each tailed stream is promised an audience, renewed well inside it."""

    async def __aenter__(self) -> "Tailer":
        raise NotImplementedError

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError

    def tail(self, job_id: str, after: str = BEGINNING) -> Subscription:
        """A reader of the stream from a cursor on. While it is entered, the stream has an audience."""
        raise NotImplementedError
