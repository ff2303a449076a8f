"""Connections to Redis, made in one place: timeouts, keepalive, and no silent retry of a write."""

import asyncio
from collections.abc import Iterable
from typing import Any, cast

import msgspec
from arq.connections import ArqRedis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from llmboost.jobs import OpaqueJob

BLOCK_S = 2.0
"""The longest that any command here blocks on the server."""
SOCKET_TIMEOUT_S = BLOCK_S + 3.0
"""Longer than any BLOCK, or a healthy wait would look like a dead connection."""


class _Connection(AbstractConnection):
    """Differs from redis-py's in this:

    1. It sends under `asyncio.timeout`. redis-py does under `asyncio.wait_for`, which on Python 3.11 costs a
       task for every command, and swallows a cancellation that comes as the send ends (python/cpython#86296):
       the caller then waits for a reply and goes on as if nobody had cancelled it.
    2. A transport that the server's reset has closed is a lost connection. uvloop says so with a
       RuntimeError, which redis-py lets through.
    """

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        if not self.is_connected:
            await self.connect()  # type: ignore[no-untyped-call]
        elif check_health:
            await self.check_health()  # type: ignore[no-untyped-call]
        if isinstance(command, str):
            command = command.encode()
        try:
            async with asyncio.timeout(self.socket_timeout):
                await self._send_packed_command([command] if isinstance(command, bytes) else command)
        except TimeoutError:
            await self.disconnect(nowait=True)
            raise RedisTimeoutError("Timeout writing to socket") from None
        except (OSError, RuntimeError) as error:
            await self.disconnect(nowait=True)
            if not _is_loss(error):
                raise
            raise RedisConnectionError(f"Error while writing to socket: {error}") from error
        except BaseException:
            # The command may be half written, so the connection is of no more use.
            await self.disconnect(nowait=True)
            raise

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except RuntimeError as error:
            await self.disconnect(nowait=True)
            if not _is_loss(error):
                raise
            raise RedisConnectionError(f"Error while reading from socket: {error}") from error


def _is_loss(error: OSError | RuntimeError) -> bool:
    return isinstance(error, OSError) or "handler is closed" in str(error)


def connect(url: str, *, client_name: str | None = None) -> ArqRedis:
    """A client with its own pool; connects at the first command.

    Retries are ours to make (`streams.persist`): a client that silently sends XADD twice would turn a
    lost reply into a refusal that nobody expects.

    Raises:
        ValueError: the URL is not a Redis URL.
    """
    tcp_only = {} if url.startswith("unix:") else {"socket_keepalive": True}
    pool = ConnectionPool.from_url(
        url,
        client_name=client_name,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=3.0,
        health_check_interval=15,
        retry=Retry(NoBackoff(), 0),
        **tcp_only,
    )
    # The URL decides between plain, TLS and Unix sockets.
    pool.connection_class = type("LLMBoostConnection", (_Connection, pool.connection_class), {})
    client = ArqRedis(pool, job_serializer=serialize, job_deserializer=deserialize)
    # Or `aclose` would leave the connections open, as if the pool were somebody else's.
    client.auto_close_connection_pool = True
    return client


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
