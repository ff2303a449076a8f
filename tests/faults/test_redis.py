"""Redis dies, comes back with its data or without, can't be reached, or answers late and only in part."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fleet import Fleet
from tests.faults.load import Load
from tests.faults.oracle import Oracle
from tests.faults.redis_server import binaries
from tests.waiting import wait_until

OUTAGE_S = 10.0
ENDED_S = 15.0
"""Within which streams end in an error whose log is lost: a pod's look after them each fifth of the grace
period, the second that it waits at most before it tries Redis again, and a crowded machine."""


@pytest.fixture(scope="module")
def file_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Fewer slots than streams, so that some wait in the queue. Nothing that happens to Redis may cost a
    request a try: it has only one.

    A renewal has a quarter of the lease. Where each way takes 100 ms and its connection is a new one, it
    needs a second; what is slower than that counts as a death, and is meant to.
    """
    flags = ("--lease", "6", "--max-num-seqs", "16", "--max-tries", "1")
    with Fleet(tmp_path_factory.mktemp("fleet"), worker_flags=flags) as fleet:
        yield fleet


@pytest.mark.parametrize("binary", [pytest.param(path, id=name) for name, path in binaries().items()])
async def test_restarted_with_its_file(fleet: Fleet, oracle: Oracle, binary: Path) -> None:
    """Redis is killed and started again on its append-only file: the same streams go on, and requests that
    waited in the queue still do and are answered."""
    fleet.redis_server.kill()
    fleet.redis_server.start(empty=True, binary=binary)
    await fleet.ready()
    async with Load(fleet, oracle, official=True) as load:
        await load.accepted()
        await load.begun(streams=16)
        assert await load.queued()
        fleet.redis_server.kill()
        fleet.redis_server.start()
        assert await load.queued()
    assert all(reader.posts == 1 and reader.resumed == 0 for reader in load.readers)


async def test_restarted_empty(fleet: Fleet, oracle: Oracle) -> None:
    """Redis comes back without its data: every open stream ends in an error soon, nobody hangs, and without
    a restart of anything new requests are answered."""
    async with Load(fleet, oracle, exact=False) as load:
        await load.accepted()
        await load.begun(streams=16)
        running = load.running
        fleet.redis_server.kill()
        fleet.redis_server.start(empty=True)
        await wait_until(lambda: not load.running, within=ENDED_S)
    assert all(reader.error for reader in running)
    await fleet.ready()
    async with Load(fleet, oracle, streams=20):
        pass


@pytest.mark.parametrize("how", ["frozen", "dropping", "refusing"])
async def test_unreachable(fleet: Fleet, oracle: Oracle, how: str) -> None:
    """Redis can't be reached for 10 s, because it is stopped, or the network drops what is sent or refuses
    it: the same streams go on afterwards, and no request has lost a try by it."""
    async with Load(fleet, oracle, official=True) as load:
        await load.accepted()
        await load.begun(streams=16)
        if how == "frozen":
            fleet.redis_server.freeze()
        elif how == "dropping":
            fleet.network.drop()
        else:
            fleet.network.refuse()
        await asyncio.sleep(OUTAGE_S)  # the fault's length
        fleet.mend()
    assert all(reader.posts == 1 and reader.resumed == 0 for reader in load.readers)


async def test_slow(fleet: Fleet, oracle: Oracle) -> None:
    """Whatever is sent to Redis or by it takes 100 ms: streams are late, and the same."""
    async with Load(fleet, oracle, official=True):
        fleet.network.delay(0.1)


async def test_lost_replies(fleet: Fleet, oracle: Oracle) -> None:
    """Connections to Redis are reset in the middle of replies, to whatever command: what was written is not
    written again, and what was not, is."""
    async with Load(fleet, oracle, official=True):
        fleet.network.lose_replies(0.02, seed=1)
    assert fleet.network.resets > 50
