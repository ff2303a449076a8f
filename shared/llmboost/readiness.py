"""Whether workers and pods are ready, as seen from outside: by the registry and by HTTP.

`python -m llmboost.readiness` is a worker's health check: 0 if a worker of this host serves. A worker has
no port to ask, but says in the registry that it serves, for as long as its heart beats.
"""

import asyncio
import http.client
import os
import socket
import sys
from contextlib import suppress

from redis.exceptions import RedisError

from llmboost.connection import connect
from llmboost.registry import Registry, WorkerCard


async def live_workers(redis_url: str) -> list[WorkerCard]:
    """Workers that serve now.

    Raises:
        RedisError, OSError: Redis does not answer.
    """
    redis = connect(redis_url, client_name="llmboost-supervisor")
    try:
        return await Registry(redis).workers()
    finally:
        with suppress(RedisError, OSError):
            await redis.aclose()


def answers(host: str, port: int, path: str) -> bool:
    """Whether GET on a path gives 200, within a second."""
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


async def _serves_here() -> bool:
    url = os.environ.get("LLMBOOST_REDIS_URL")
    if not url:
        sys.exit("LLMBOOST_REDIS_URL is not set")
    # A worker's id begins with the name of its host, which for a container is its own.
    return any(card.worker.startswith(f"{socket.gethostname()}-") for card in await live_workers(url))


if __name__ == "__main__":
    try:
        sys.exit(0 if asyncio.run(_serves_here()) else "no worker of this host serves")
    except (RedisError, OSError, ValueError) as error:
        sys.exit(f"Redis: {error}")
