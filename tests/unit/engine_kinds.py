"""The engines that are installed here, for tests of what all of them promise."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from llmboost_worker.engine.vllm.config import VllmConfig
from llmboost_worker.engine.vllm.engine import VllmEngine
from tests.unit.engine_models import COMMON, Driver, driving, save_model

ENGINES = ["transformers", *(["vllm"] if importlib.util.find_spec("vllm") else [])]

CONFIG = LlamaConfig(**COMMON, head_dim=32)
"""vLLM's attention on a CPU has no kernel for the smaller heads of the other models."""

OPTIONS = {"max_num_batched_tokens": 64, "max_num_seqs": 24}


@contextmanager
def driving_vllm(
    folder: Path, tokens: Callable[[], list[bytes]] | None = None, **options: Any
) -> Iterator[Driver]:
    """vLLM on that folder, closed at the end; its environment is its own."""
    config = VllmConfig(
        str(folder), threads=1, kv_cache_memory=0.25, options={"enforce_eager": True}, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("VLLM_", "OMP_", "LLMBOOST_VLLM_"))]:
            patch.delenv(name)
        before = dict(os.environ)
        engine = VllmEngine(config, tokens)
        try:
            yield Driver(engine)
        finally:
            engine.close()
            for name in os.environ.keys() - before.keys():
                del os.environ[name]


@contextmanager
def driving_kind(kind: str, folder: Path) -> Iterator[Driver]:
    """An engine of that kind on a model that both can run, with `OPTIONS`."""
    save_model(CONFIG, folder)
    with (driving_vllm if kind == "vllm" else driving)(folder, **OPTIONS) as driver:
        yield driver
