"""Limits of a container count, not only those of the machine."""

import os
from pathlib import Path

import psutil
import pytest

from llmboost import machine

GIB = 1 << 30


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "membership").write_text("3:cpu,cpuacct:/\n4:memory:/\n0::/service/worker\n")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10 * GIB}))
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_physical_cores_count_without_a_limit(cgroup: Path) -> None:
    assert machine.available_cores() == 8


def test_affinity_limits_cores(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4})
    assert machine.available_cores() == 2


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1), ("", 8)]
)
def test_a_quota_of_cgroup_2_limits_cores(cgroup: Path, quota: str, cores: int) -> None:
    write(cgroup, cpu__max=quota)
    assert machine.available_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 8), (400000, 4)])
def test_a_quota_of_cgroup_1_limits_cores(cgroup: Path, quota: int, cores: int) -> None:
    write(cgroup / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us=100000)
    assert machine.available_cores() == cores


def test_memory_is_the_machines_without_a_limit(cgroup: Path) -> None:
    assert machine.available_memory() == 10 * GIB
    write(cgroup, memory__max="max", memory__current=5 * GIB)
    assert machine.available_memory() == 10 * GIB


def test_a_limit_of_cgroup_2_bounds_memory_and_page_cache_is_free(cgroup: Path) -> None:
    write(cgroup, memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=f"anon 5\ninactive_file {GIB}")
    assert machine.available_memory() == 2 * GIB


def test_a_limit_of_cgroup_1_bounds_memory(cgroup: Path) -> None:
    memory = cgroup / "memory"
    write(memory, memory__limit_in_bytes=4 * GIB, memory__usage_in_bytes=3 * GIB)
    assert machine.available_memory() == 1 * GIB
    write(memory, memory__limit_in_bytes=9223372036854771712)
    assert machine.available_memory() == 10 * GIB


def test_the_tightest_of_nested_cgroups_counts(cgroup: Path) -> None:
    write(cgroup, cpu__max="600000 100000", memory__max=8 * GIB, memory__current=2 * GIB)
    write(cgroup / "service", cpu__max="300000 100000", memory__max=5 * GIB, memory__current=2 * GIB)
    write(cgroup / "service/worker", cpu__max="max 100000", memory__max="max", memory__current=1 * GIB)
    write(cgroup / "elsewhere", cpu__max="100000 100000", memory__max=1, memory__current=0)
    assert machine.available_cores() == 3
    assert machine.available_memory() == 3 * GIB
