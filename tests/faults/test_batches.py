"""A batch outlives whoever runs it, and what it runs on."""

import asyncio
from collections.abc import Iterator
from random import Random

import pytest

from tests.faults.batches import Row, RunningBatch, compare
from tests.faults.fleet import Fleet

LINES = 2000
FORGOTTEN = 200_000
"""Bytes of Redis's file: what some hundred lines write, or a busy server in its last second."""
OUTAGE_S = 6.0
"""Longer than a runner's lease, and a worker's."""


@pytest.fixture(scope="module")
def file_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """There is no limit to the workers that a line may lose."""
    folder = tmp_path_factory.mktemp("fleet")
    workers = ("--lease", "2", "--max-tries", "100")
    pods = ("--files-url", str(folder / "files"))
    with Fleet(folder, worker_flags=workers, pod_flags=pods) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def known() -> dict[int, Row]:
    """Answers of lines while nothing happens, as far as they have been learnt."""
    return {}


async def learn(fleet: Fleet, known: dict[int, Row], lines: int) -> None:
    """Runs the batch without a fault, once."""
    if len(known) < lines:
        unbroken = RunningBatch(fleet, lines)
        await unbroken.begin()
        known.update(await unbroken.rows())


async def test_everyone_dies(fleet: Fleet, known: dict[int, Row]) -> None:
    """Workers are killed at random, and twice the pod that runs the batch: each line's answer is in the
    output once, and is what it is when nobody dies."""
    random = Random(1)
    await learn(fleet, known, LINES)
    batch = RunningBatch(fleet, LINES)
    await batch.begin()
    for part in range(1, 6):
        await batch.reached(part * LINES // 7)
        if part % 2 == 0:
            runner = await batch.runner()
            assert runner in fleet.pods
            fleet.kill(runner)
        else:
            fleet.kill(random.choice(fleet.worker_names))
        assert await batch.done() < LINES
        fleet.mend()
    assert await compare(await batch.rows(), known) <= LINES // 100


@pytest.mark.parametrize("how", ["killed", "losing its latest", "frozen", "losing replies"])
async def test_redis_fails(fleet: Fleet, known: dict[int, Row], how: str) -> None:
    """Redis is killed and started again on its file, or on what is left of it without its latest writes, or
    stopped for longer than any lease, or connections to it are reset in the middle of replies: the batch goes
    on, with the same result."""
    lines = LINES // 4
    await learn(fleet, known, lines)
    batch = RunningBatch(fleet, lines)
    await batch.begin()
    if how == "losing replies":
        fleet.network.lose_replies(0.01, seed=1)
    else:
        await batch.reached(lines // 4)
        if how != "frozen":
            fleet.redis_server.kill(forget=0 if how == "killed" else FORGOTTEN)
            fleet.redis_server.start()
        else:
            fleet.redis_server.freeze()
            await asyncio.sleep(OUTAGE_S)  # the fault's length
            fleet.redis_server.thaw()
    assert await compare(await batch.rows(), known) <= lines // 100
    assert how != "losing replies" or fleet.network.resets > 10
