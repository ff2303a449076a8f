"""The worker's command with an engine that needs no model: `python -m tests.integration.scripted_worker HOW`.

`serves`: as it should; `loads`: its model never gets loaded; `steps`: its engine never ends the current step.
"""

import sys
import threading
from typing import Any

from llmboost.settings import WorkerSettings
from llmboost_worker import worker
from tests.engines import ScriptedEngine
from tests.unit.text_tokenizers import byte_level


class EndlessStep(ScriptedEngine):
    """Can't be closed."""

    def close(self) -> None:
        threading.Event().wait()


def load(settings: WorkerSettings) -> tuple[Any, Any]:
    """Takes the place of `load_model`."""
    print("loading", flush=True)
    if sys.argv[1] == "loads":
        threading.Event().wait()
    kind = EndlessStep if sys.argv[1] == "steps" else ScriptedEngine
    return kind(list(range(60, 90)), max_num_seqs=settings.max_num_seqs), byte_level()


if __name__ == "__main__":
    worker.load_model = load
    sys.exit(worker.run(WorkerSettings()))
