"""Tests that need vLLM, and so an environment of their own: `make test-vllm`."""

from tests.e2e.conftest import pytest_runtest_makereport as pytest_runtest_makereport
from tests.unit.conftest import vllm_driver as vllm_driver
