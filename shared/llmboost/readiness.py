"""Whether workers and pods are ready, as seen from outside: by the registry and by HTTP."""

import http.client
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
