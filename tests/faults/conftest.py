"""One fleet per file, whole again before each test and without a trace of its requests after it."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e.conftest import pytest_runtest_makereport  # noqa: F401
from tests.faults import leaks
from tests.faults.fleet import Fleet
from tests.faults.oracle import Oracle


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """What every request's answer is; the same for every fleet."""
    return Oracle()


@pytest.fixture
async def fleet(file_fleet: Fleet) -> AsyncIterator[Fleet]:
    """The file's own, with all its parts and no fault."""
    file_fleet.mend()
    await file_fleet.ready()
    yield file_fleet
    file_fleet.mend()
    async with file_fleet.redis() as redis:
        await leaks.check(redis)
