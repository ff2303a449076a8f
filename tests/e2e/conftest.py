"""One system for all tests that need nothing special of it, and its logs beside a failure."""

from collections.abc import AsyncIterator, Iterator

import pytest

from llmboost.connection import connect
from llmboost.streams import TokenStreams
from tests.e2e import system as systems
from tests.e2e.system import MODEL, SEED_NAME, System


@pytest.fixture(scope="session")
def system() -> Iterator[System]:
    """`llmboost serve` with the demo model under two names. All tests run with `id:` lines, and with pings so
    dense that they come between any two frames."""
    with systems.serving("--served-model-name", f"{MODEL},{SEED_NAME}", "--ping-interval", "0.05") as running:
        yield running


@pytest.fixture
async def streams(system: System) -> AsyncIterator[TokenStreams]:
    """The token streams themselves, as they lie in Redis."""
    redis = connect(system.redis_url)
    yield TokenStreams(redis, retention=600)
    await redis.aclose()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever test comes first waits for the system, which takes its time on a crowded machine."""
    for item in items:
        if "tests/e2e/" in item.path.as_posix() and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(2 * systems.LOADING_S))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: "pytest.CallInfo[None]") -> "Iterator[None]":
    report = yield
    if report.failed:
        report.sections += [(f"log of {name}", log) for name, log in systems.logs()]
    return report
