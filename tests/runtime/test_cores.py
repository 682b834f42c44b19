"""Cores and memory are what the container may use, not what the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorapool_runtime.cores import usable_cores, usable_memory_bytes

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
