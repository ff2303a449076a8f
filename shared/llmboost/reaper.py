"""The reaper: every accepted request ends in a terminal entry, whatever has died. Any process may run one."""

import asyncio
import logging
import random

from redis.exceptions import RedisError

from llmboost.queue import JobQueue

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0


async def reap_forever(queue: JobQueue, by: str) -> None:
    """Seals overdue and orphaned streams about once a second; goes on when Redis comes back."""
    while True:
        try:
            if sealed := await queue.reap(by):
                logger.info("sealed %d stranded streams", sealed)
        except (RedisError, OSError) as error:
            logger.warning("can't reap: %s", error)
        except Exception:  # a defect here must not end what every other guarantee falls back on
            logger.exception("can't reap")
        # Jitter: several processes reap the same streams.
        await asyncio.sleep(INTERVAL_S * random.uniform(0.5, 1.5))
