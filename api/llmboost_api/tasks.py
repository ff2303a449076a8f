"""Tasks that are no longer wanted."""

import asyncio
from typing import Any


async def discard(task: "asyncio.Task[Any] | None") -> None:
    """Cancels a task whose outcome nobody wants, and waits until it has ended."""
    if task is None:
        return
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()
