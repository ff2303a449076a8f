"""vLLM takes its time to start: one serves all tests of what engines promise."""

from collections.abc import Iterator

import pytest

from tests.unit.engine_kinds import driving_kind
from tests.unit.engine_models import Driver


@pytest.fixture(scope="session")
def vllm_driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with driving_kind("vllm", tmp_path_factory.mktemp("vllm")) as driver:
        yield driver
