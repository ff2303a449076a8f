"""A batch outlives whoever runs it."""

from collections.abc import Iterator
from random import Random

import pytest

from tests.faults.batches import RunningBatch, compare
from tests.faults.fleet import Fleet

LINES = 2000


@pytest.fixture(scope="module")
def file_fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """There is no limit to the workers that a line may lose."""
    folder = tmp_path_factory.mktemp("fleet")
    workers = ("--lease", "2", "--max-tries", "100")
    pods = ("--files-url", str(folder / "files"))
    with Fleet(folder, worker_flags=workers, pod_flags=pods) as fleet:
        yield fleet


async def test_everyone_dies(fleet: Fleet) -> None:
    """Workers are killed at random, and twice the pod that runs the batch: each line's answer is in the
    output once, and is what it is when nobody dies."""
    random = Random(1)
    unbroken = RunningBatch(fleet, LINES)
    await unbroken.begin()
    known = await unbroken.rows()

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
