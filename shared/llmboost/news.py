"""Something has come: said by whoever brings it, waited for by the one task that takes it."""

import asyncio


class News:
    """An event with one waiter. An `asyncio.Event` serves any number, and a token would pay for it."""

    __slots__ = ("_come", "_loop", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._come = False
        self._waiter: asyncio.Future[None] | None = None

    def tell(self) -> None:
        """Something has come."""
        self._come = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Returns once something has come since the last time; at once if it has already."""
        if not self._come:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._come = False
