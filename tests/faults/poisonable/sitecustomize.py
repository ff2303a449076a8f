"""Python imports this by itself in processes that find this folder on their path; it makes their engine one
that can be poisoned.

A request whose prompt holds `POISON` kills the process that is given it, as a request may that makes a driver
crash or the machine run out of memory. The worker's module is changed when it is imported, which is the only
way in: the product has no switch for tests.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

POISON = "POISON"
TARGET = "llmboost_worker.worker"


class PoisonableLoader(importlib.abc.Loader):
    """Runs the module as it is, then puts poisonable engines into what it loads."""

    def __init__(self, real: importlib.abc.Loader) -> None:
        self._real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        load = module.load_model  # type: ignore[attr-defined]

        def load_poisonable(settings: Any) -> Any:
            engine, tokenizer = load(settings)
            add = engine.add

            def add_or_die(requests: Any) -> None:
                if any(POISON in tokenizer.decode(request.prompt_ids) for request in requests):
                    os.kill(os.getpid(), signal.SIGKILL)
                add(requests)

            engine.add = add_or_die
            return engine, tokenizer

        module.load_model = load_poisonable  # type: ignore[attr-defined]


class PoisonableFinder(importlib.abc.MetaPathFinder):
    """Finds one module, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = PoisonableLoader(spec.loader)
        return spec


sys.meta_path.insert(0, PoisonableFinder())
