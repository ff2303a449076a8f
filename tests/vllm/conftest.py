"""Tests that need vLLM, and so an environment of their own: `make test-vllm`."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import pytest_runtest_makereport as pytest_runtest_makereport
from tests.unit.conftest import vllm_driver as vllm_driver


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where these tests and what they start have them: some of it is killed, and then vLLM leaves some."""
    folder = tmp_path_factory.mktemp("t")  # short: sockets are there, whose names have a limit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", str(folder))
        yield folder
