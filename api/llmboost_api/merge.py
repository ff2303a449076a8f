"""Several streams of one completion, read as one."""

from llmboost.entries import ReadEntry
from llmboost.news import News
from llmboost.tailer import Subscription

Step = tuple[int, list[ReadEntry]]
"""(index of the job, entries of its stream that came together)."""


class Merge:
    """Several subscriptions as one; nothing is lost when a wait for the next step is cancelled."""

    def __init__(self) -> None:
        self.news = News()
        """For the subscriptions to tell of theirs."""
        self._open: list[tuple[int, Subscription]] = []
        self._error: Exception | None = None

    def add(self, index: int, subscription: Subscription) -> None:
        self._open.append((index, subscription))

    def interrupt(self, error: Exception) -> None:
        """Raises an error where `next` would wait, or waits."""
        self._error = error
        self.news.tell()

    async def next(self) -> Step:
        """Raises `StopAsyncIteration` when all have ended."""
        while self._open:
            for place, (index, subscription) in enumerate(self._open):
                if subscription.ready:
                    batch = subscription.take()
                    # To the end of the line: one that always has something must not keep out the others.
                    del self._open[place]
                    if not subscription.ended:
                        self._open.append((index, subscription))
                    return index, batch
            if self._error is not None:
                raise self._error
            await self.news.wait()
        raise StopAsyncIteration
