"""Pods die, or are told to go, and their clients read on from others."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.fleet import Fleet, exit_of
from tests.faults.load import Load
from tests.faults.oracle import Oracle
from tests.faults.reader import Reader
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def file_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


async def test_a_killed_pod(fleet: Fleet, oracle: Oracle) -> None:
    """A pod is killed under all its streams: the generations go on, and its clients get exactly the rest
    from the other pod. A second reader of a stream has all of it too."""
    async with Load(fleet, oracle) as load:
        await load.begun()
        second = [Reader.of(reader, load.urls, number) for number, reader in enumerate(load.running[::7])]
        twice = [asyncio.create_task(reader.read(load.http)) for reader in second]
        lost = [reader for reader in load.running if reader.url == fleet.urls[0]]
        kept = [reader for reader in load.running if reader not in lost]
        assert lost
        fleet.kill("pod-0")
        await asyncio.gather(*twice)
        await load.check(second)
    # Not all for certain: the last frames of some may have been on their way.
    assert any(reader.resumed for reader in lost)
    assert all(reader.resumed == 0 for reader in kept)
    assert all(reader.posts == 1 for reader in load.readers)


async def test_both_pods_in_turn(fleet: Fleet, oracle: Oracle) -> None:
    """Each pod is killed as soon as the other is there again: a stream may lose its pod more than once."""
    async with Load(fleet, oracle) as load:
        for name in fleet.pods * 2:
            await load.begun(2)
            fleet.kill(name)
            fleet.mend()
            await fleet.ready()
    assert all(reader.posts == 1 for reader in load.readers)


async def test_a_pod_told_to_go(fleet: Fleet, oracle: Oracle) -> None:
    """Its streams finish over their own connections; it takes no new ones, and ends well."""
    async with Load(fleet, oracle) as load:
        await load.begun()
        going = fleet.tell_to_go("pod-0")
        await wait_until(lambda: refuses(fleet.urls[0]))
        assert going.process.poll() is None
    assert all(reader.resumed == 0 for reader in load.readers)
    assert (await exit_of(going))[0] == 0


async def test_a_pod_that_can_not_wait(fleet: Fleet, oracle: Oracle) -> None:
    """A pod whose time to drain is over ends its streams in a way that says so, and cancels no job: its
    clients get the rest from the other pod."""
    fleet.kill("pod-0")
    fleet.add_pod("pod-0", "--drain-timeout", "0.1")
    await fleet.ready()
    async with Load(fleet, oracle) as load:
        await load.begun()
        lost = [reader for reader in load.running if reader.url == fleet.urls[0]]
        assert lost
        assert (await exit_of(fleet.tell_to_go("pod-0")))[0] == 0
    # Not all, if the machine is quick: some may have finished in time.
    assert any(reader.resumed for reader in lost)
    assert all(reader.posts == 1 for reader in load.readers)


def refuses(url: str) -> bool:
    """Whether nobody listens there."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    try:
        socket.create_connection((host, port or 0), timeout=1).close()
    except ConnectionRefusedError:
        return True
    return False
