"""What this process may use of the machine: cores and memory, containers' limits included."""

import math
import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
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
    """Quota over period, of cgroup v2 or v1, rounded up."""
    fields = _read(CGROUP / "cpu.max").split()
    if not fields:
        fields = [_read(CGROUP / "cpu/cpu.cfs_quota_us"), _read(CGROUP / "cpu/cpu.cfs_period_us")]
    try:
        quota, period = int(fields[0]), int(fields[1])
    except (ValueError, IndexError):
        return UNLIMITED
    return math.ceil(quota / period) if quota > 0 and period > 0 else UNLIMITED


def _cgroup_memory() -> int:
    """Bytes left under the limit of cgroup v2 or v1. Page cache counts as used, but inactive file pages are
    given back on demand, so they count as free here."""
    for folder, limit_file, usage_file in (
        (CGROUP, "memory.max", "memory.current"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limit, usage = _read(folder / limit_file), _read(folder / usage_file)
        if limit.isdigit() and usage.isdigit() and int(limit) < UNLIMITED:
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
            return max(0, int(limit) - int(usage) + reclaimable)
    return UNLIMITED


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
