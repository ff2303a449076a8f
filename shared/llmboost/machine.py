"""What this process may use of the machine: cores and memory, containers' limits included."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 60
"""cgroup v1 writes "no limit" as a number near 2^63."""


def available_cores() -> int:
    """Cores worth a thread each: physical ones (hyperthreads share the vector units that matrix products
    live on), no more than the process's CPU affinity and its cgroup's quota allow."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False) or affinity
    return max(1, min(affinity, physical, _cgroup_cores()))


def available_memory() -> int:
    """Bytes of main memory that can still be allocated: the lesser of what the kernel says (`psutil` reads
    the whole machine) and what the cgroup leaves."""
    return min(int(psutil.virtual_memory().available), _cgroup_memory())


def _cgroup_cores() -> int:
    """The least quota over period, rounded up, of the cgroups (v2 or v1) that the process is in."""
    cores = UNLIMITED
    for folder in _cgroups("cpu"):
        fields = _read(folder / "cpu.max").split()
        if not fields:
            fields = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        # "max", -1 and nothing at all are no quota.
        if len(fields) == 2 and fields[0].isdigit() and fields[1].isdigit():
            cores = min(cores, math.ceil(int(fields[0]) / int(fields[1])))
    return cores


def _cgroup_memory() -> int:
    """The least that is left under the limit of a cgroup (v2 or v1) that the process is in. Page cache counts
    as used there, but inactive file pages are given back on demand, so here they count as free."""
    left = UNLIMITED
    for folder in _cgroups("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        usage = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit.isdigit() and usage.isdigit() and int(limit) < UNLIMITED:
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
            left = min(left, max(0, int(limit) - int(usage) + reclaimable))
    return left


def _cgroups(controller: str) -> Iterator[Path]:
    """Folders of the process's cgroup and all above it; in a container usually one, the root."""
    for line in _read(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP / controller if controllers else CGROUP  # version 2 names no controllers
        yield root
        for depth in range(1, len(Path(path).parts)):
            yield root.joinpath(*Path(path).parts[1 : depth + 1])


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
