"""What part of this machine each worker of `serve` gets: CPU threads and GPUs."""

import os
import shutil
import subprocess
from contextlib import suppress

from llmboost.machine import available_cores
from llmboost.settings import ServeSettings


class PlacementError(Exception):
    """The workers don't fit this machine; `str()` says why."""


def placements(settings: ServeSettings) -> list[dict[str, str]]:
    """Environment variables for each of the `dp` workers.

    On GPUs each gets `tp` times `pp` of its own. With fewer GPUs than workers they share, unless that is
    above 1.

    Raises:
        PlacementError: one model needs more GPUs than there are.
    """
    environments: list[dict[str, str]] = [{} for _ in range(settings.dp)]
    if settings.dp > 1 and settings.threads == 0:
        for environment in environments:
            environment["LLMBOOST_THREADS"] = str(max(1, available_cores() // settings.dp))
    available = gpus() if settings.device in ("auto", "cuda") else []
    if available:
        each = settings.tp * settings.pp
        if each > 1 and settings.dp * each > len(available):
            stages = f" times --pp {settings.pp}" if settings.pp > 1 else ""
            raise PlacementError(
                f"--dp {settings.dp} times --tp {settings.tp}{stages} needs {settings.dp * each} GPUs, "
                f"but there are {len(available)}"
            )
        for index, environment in enumerate(environments):
            mine = (available[(index * each + k) % len(available)] for k in range(each))
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    return environments


def gpus() -> list[str]:
    """Names of the CUDA GPUs this process may use, as CUDA_VISIBLE_DEVICES takes them.

    Found without torch, whose import takes seconds.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return [name for name in names if name and name != "-1"]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    with suppress(OSError, subprocess.SubprocessError):
        query = [tool, "--query-gpu=index", "--format=csv,noheader"]
        listing = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        return [line.strip() for line in listing.splitlines() if line.strip().isdigit()]
    return []
