"""Connections to Redis, made in one place: timeouts, keepalive, and no silent retry of a write."""

from typing import Any, cast

import msgspec
from arq.connections import ArqRedis
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from llmboost.jobs import OpaqueJob

BLOCK_S = 2.0
"""The longest that any command here blocks on the server."""
SOCKET_TIMEOUT_S = BLOCK_S + 3.0
"""Longer than any BLOCK, or a healthy wait would look like a dead connection."""


def connect(url: str, *, client_name: str | None = None) -> ArqRedis:
    """A client with its own pool; connects at the first command.

    Retries are ours to make (`streams.persist`): a client that silently sends XADD twice would turn a
    lost reply into a refusal that nobody expects.

    Raises:
        ValueError: the URL is not a Redis URL.
    """
    pool = ConnectionPool.from_url(
        url,
        client_name=client_name,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=3.0,
        socket_keepalive=True,
        health_check_interval=15,
        retry=Retry(NoBackoff(), 0),
    )
    return ArqRedis(pool, job_serializer=serialize, job_deserializer=deserialize)


def _plain(value: Any) -> Any:
    """arq also serializes exceptions, as results of failed jobs."""
    if isinstance(value, OpaqueJob):
        return value.data
    if isinstance(value, BaseException):
        return f"{type(value).__name__}: {value}"
    raise TypeError(f"{type(value).__name__} does not go into a job")


_encoder = msgspec.msgpack.Encoder(enc_hook=_plain)


def serialize(data: dict[str, Any]) -> bytes:
    """arq's job or result, as msgpack."""
    return _encoder.encode(data)


def deserialize(data: bytes) -> dict[str, Any]:
    """arq's job or result; the arguments of a job come wrapped, for arq logs them."""
    decoded = cast("dict[str, Any]", msgspec.msgpack.decode(data))
    decoded["a"] = tuple(OpaqueJob(arg) if isinstance(arg, bytes) else arg for arg in decoded["a"])
    return decoded
