"""Long work in small bites: what a pod does for a batch must not be felt by the streams beside it."""

import asyncio
import time

BITE_S = 0.003
"""About as long as a few frames take to be written."""


class Pace:
    """To be called between steps of work that never waits by itself."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    async def rest(self) -> None:
        """Lets everybody else have a turn if a bite was had since the last one."""
        if time.perf_counter() - self._since > BITE_S:
            await asyncio.sleep(0)
            self._since = time.perf_counter()
