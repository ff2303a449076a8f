"""The processes of the ranks above 0: started by the engine of rank 0, or each by torchrun."""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from llmboost.child import Child
from llmboost.embedded import free_port
from llmboost_worker.engine.interface import EngineError
from llmboost_worker.engine.transformers import core, ranks
from llmboost_worker.engine.transformers.config import EngineConfig
from llmboost_worker.engine.transformers.failures import RankLost

logger = logging.getLogger(__name__)

GOODBYE_S = 5.0
"""How long followers may take to end once they are told to."""


class Followers:
    """Those that an engine has started. They end with it, whatever ends it; precisely, with the thread that
    starts them."""

    def __init__(self, config: EngineConfig, on_end: Callable[[str], None]) -> None:
        """`on_end`: called from another thread if one ends by itself, with what there is to say of it."""
        self._on_end = on_end
        self._closing = threading.Event()
        self.place = ranks.Place(0, 0, config.tp, "127.0.0.1", free_port("127.0.0.1"))
        self._children = [self._child(config, rank) for rank in range(1, config.tp)]

    def start(self, config: EngineConfig) -> None:
        for child in self._children:
            child.start(stdin=json.dumps(asdict(config)).encode())

    def close(self) -> None:
        """After they were told to end."""
        self._closing.set()
        for child in self._children:
            if not child.wait(GOODBYE_S):
                child.kill()

    def _child(self, config: EngineConfig, rank: int) -> Child:
        place = replace(self.place, rank=rank, local_rank=rank)
        return Child(
            f"rank-{rank}",
            # -P: a file in the user's folder must not stand in for a module of ours.
            [sys.executable, "-P", "-m", "llmboost_worker.rank"],
            env={**os.environ, **place.environment()},
            log=lambda line: print(line, file=sys.stderr),
            on_exit=lambda: self._ended(rank),
        )

    def _ended(self, rank: int) -> None:
        if not self._closing.is_set():
            self._on_end(f"rank {rank} of the model has died; its last words stand above")


def follow(config: EngineConfig, place: ranks.Place) -> int:
    """Is a rank above 0 until rank 0's engine closes; returns the process's exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        # For rank 0, which lets its sequences go first. Nobody ends while it computes.
        signal.signal(signum, signal.SIG_IGN)
    try:
        with torch.inference_mode():
            core.follow(config, place)
    except (EngineError, RankLost) as error:
        print(f"llmboost worker, rank {place.rank}: {error}", file=sys.stderr)
        return os.EX_SOFTWARE
    return os.EX_OK
