"""Cores and memory are the limits of the container, not of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorapool_runtime.cgroup import usable_cores, usable_memory_bytes

AFFINITY = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("max 100000", AFFINITY), ("100000 100000", 1), ("50000 100000", 1), ("9900000 100000", AFFINITY)],
)
def test_cores_are_the_smaller_of_affinity_and_quota(tmp_path: Path, cpu_max: str, cores: int) -> None:
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert usable_cores(tmp_path) == cores


def test_without_a_cgroup_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == AFFINITY


def test_memory_is_what_the_limit_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert usable_memory_bytes(tmp_path, meminfo) == 8_192_000
    (tmp_path / "memory.max").write_text("max")
    (tmp_path / "memory.current").write_text("1000000")
    assert usable_memory_bytes(tmp_path, meminfo) == 8_192_000
    (tmp_path / "memory.max").write_text("3000000")
    assert usable_memory_bytes(tmp_path, meminfo) == 2_000_000


GIB = 2**30
UNLIMITED_V1 = "9223372036854771712"


def version_1(cgroup: Path, **files: str) -> Path:
    """A fake of a container's /sys/fs/cgroup in version 1: `memory__limit_in_bytes` is memory/memory.limit_in_bytes."""
    for name, text in files.items():
        controller, _, field = name.partition("__")
        (cgroup / controller).mkdir(exist_ok=True)
        (cgroup / controller / f"{controller}.{field}").write_text(text + "\n")
    return cgroup


@pytest.mark.parametrize(
    ("quota", "period", "cores"),
    [("-1", "100000", AFFINITY), ("100000", "100000", 1), ("50000", "100000", 1), ("9900000", "100000", AFFINITY)],
)
def test_a_quota_of_cgroup_version_1_counts_alike(tmp_path: Path, quota: str, period: str, cores: int) -> None:
    assert usable_cores(version_1(tmp_path, cpu__cfs_quota_us=quota, cpu__cfs_period_us=period)) == cores


@pytest.mark.parametrize(
    ("limit", "used", "usable"),
    [
        (6 * GIB, 1 * GIB, 5 * GIB),
        (6 * GIB, 7 * GIB, 0),
        (64 * GIB, 1 * GIB, 24 * GIB),
        (int(UNLIMITED_V1), 1 * GIB, 24 * GIB),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_a_pod_of_6_gib_on_a_machine_of_24_has_what_its_own_limit_leaves(
    tmp_path: Path, version: int, limit: int, used: int, usable: int
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemAvailable: {24 * GIB // 1024} kB\n")
    if version == 1:
        version_1(tmp_path, memory__limit_in_bytes=str(limit), memory__usage_in_bytes=str(used))
    else:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
    assert usable_memory_bytes(tmp_path, meminfo) == usable


def test_files_that_hold_no_numbers_are_no_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemAvailable: 8000 kB\n")
    version_1(tmp_path, memory__limit_in_bytes="", memory__usage_in_bytes="x", cpu__cfs_quota_us="100000")
    assert usable_memory_bytes(tmp_path, meminfo) == 8_192_000
    assert usable_cores(tmp_path) == AFFINITY
