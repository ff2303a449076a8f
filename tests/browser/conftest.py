"""A browser, pages of an origin that is not the API's, and systems for them to use."""

import os
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.chromium import CHROMIUM, Chromium, Page
from tests.e2e.conftest import pytest_runtest_makereport  # noqa: F401
from tests.e2e.system import LOADING_S


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever test comes first waits for the system, which takes its time on a crowded machine."""
    for item in items:
        if "tests/browser/" in item.path.as_posix():
            item.add_marker(pytest.mark.timeout(2 * LOADING_S))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    if CHROMIUM is None:
        reason = "needs Chromium (Debian: chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


class _Pages(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Not on the tests' output."""


@pytest.fixture(scope="session")
def origin() -> Iterator[str]:
    """Where the pages come from."""
    handler = partial(_Pages, directory=str(Path(__file__).parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
async def page(chromium: Chromium, origin: str) -> AsyncIterator[Page]:
    """The page, in a tab of its own."""
    async with await chromium.open(f"{origin}/page.html") as opened:
        yield opened
