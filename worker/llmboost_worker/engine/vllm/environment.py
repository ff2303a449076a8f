"""What vLLM reads from the environment, for itself and for the processes that it starts."""

import os
from pathlib import Path

from llmboost.machine import available_cores
from llmboost.settings import variable

OWNER = "LLMBOOST_VLLM_OWNER"
"""The process id of the worker whose engine it is: `plugin` acts on it in each process of vLLM's."""

LOG_LEVEL = variable("log_level")

CPU_SHARE = 0.7
"""Of the memory that is free on a CPU, for weights and cache. What is free is shared with other processes."""


def prepare(log_level: str, is_eager: bool) -> None:
    """For any device; before vLLM is imported. What the user has set stays."""
    os.environ[OWNER] = str(os.getpid())
    os.environ[LOG_LEVEL] = log_level
    for name, value in {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        # This process has its logging already, and `plugin` sets up the same in the others.
        "VLLM_CONFIGURE_LOGGING": "0",
        # They have nothing to save, and one hangs for all of the five seconds that it is given otherwise.
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
        # `drawing` is a logits processor of the first model runner's kind.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
    }.items():
        os.environ.setdefault(name, value)
    if (
        is_eager
    ):  # vLLM would still compile what ranks log probabilities, for which a CPU needs a C++ compiler
        os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def prepare_cpu(threads: int | None, processes: int) -> bool:
    """For a CPU; before the engine starts. `processes`: over which one model is split. Returns whether vLLM
    binds its threads, by our choice or the user's."""
    binding, count = threads_of(threads, processes)
    binding = os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", binding)
    if binding == "nobind":
        os.environ.setdefault("OMP_NUM_THREADS", str(count))
    return binding != "nobind"


def threads_of(threads: int | None, processes: int) -> tuple[str, int]:
    """How vLLM binds its threads, and how many there are if it doesn't.

    By itself it keeps one core free for its scheduler, which on two cores is half the speed. The processes of
    a model that is split keep to cores of their own, but only where the machine is one's own: told how many
    threads to use, several workers may share it, and bound they would all take the same first cores.
    """
    cores = _physical_cores()
    each = len(cores) // processes
    if processes > 1 and threads is None and len(cores) == available_cores() and each:
        parts = [cores[start : start + each] for start in range(0, processes * each, each)]
        return "|".join(",".join(map(str, part)) for part in parts), 0
    return "nobind", max(1, (threads or available_cores()) // processes)


def _physical_cores() -> list[int]:
    """One logical CPU of each core that this process may use."""
    first: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        first.setdefault(_siblings(cpu), cpu)
    return sorted(first.values())


def _siblings(cpu: int) -> str:
    """The logical CPUs of the same core; itself if the kernel doesn't say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def memory_share() -> float:
    """The part of the memory that a model may use on a CPU, weights included: vLLM's
    `gpu_memory_utilization`, whose default counts on 92 % of the machine."""
    from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node

    node = get_memory_node_info(get_visible_memory_node()[0])
    return float(CPU_SHARE * node.available_memory / node.total_memory)
