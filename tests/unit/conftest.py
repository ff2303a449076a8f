"""What takes its time to start, so that tests share it."""

from collections.abc import Iterator

import pytest

from tests.unit.engine_kinds import driving_kind
from tests.unit.engine_models import Driver
from tests.unit.grammars import close_grammars


@pytest.fixture(scope="session")
def vllm_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """vLLM, for all tests of what engines promise."""
    with driving_kind("vllm", tmp_path_factory.mktemp("vllm")) as driver:
        yield driver


@pytest.fixture(scope="module", autouse=True)
def _no_grammars_left() -> Iterator[None]:
    """Their threads would be there for all tests that come later in this process."""
    yield
    close_grammars()
