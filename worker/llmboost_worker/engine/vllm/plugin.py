"""What our engine needs in each process that vLLM starts for it: vLLM loads this as a `general_plugin`.

It does nothing where vLLM is used without us.
"""

import logging
import os
import select
import signal
import threading
from typing import cast

from llmboost import logs
from llmboost.settings import LogLevel
from llmboost_worker.engine.vllm.complaints import Outbox
from llmboost_worker.engine.vllm.environment import LOG_LEVEL, OWNER


def register() -> None:
    """Called early in every process of vLLM's; more than once is fine."""
    owner = int(os.environ.get(OWNER, "0"))
    if not owner or owner == os.getpid():
        return
    logs.configure(cast(LogLevel, os.environ.get(LOG_LEVEL, "info")))
    logging.getLogger("vllm").addHandler(Outbox())
    if os.getpgid(0) == os.getpgid(owner):
        os.setpgid(0, 0)  # the terminal's Ctrl-C is for the worker alone, which hands over its jobs first
    _end_with(owner)


def _end_with(owner: int) -> None:
    """A worker that is killed must not leave processes behind that hold the memory its successor needs.
    vLLM's notice a parent's orderly end; this is for the other kind."""
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    except (AttributeError, OSError):
        return  # not on Linux

    def watch() -> None:
        select.select([descriptor], [], [])  # readable when the process has ended
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="llmboost-leash", daemon=True).start()
