"""How many CPU cores and how much memory the container of this process allows it to use.

By default torch starts a thread for every core of the machine. In a container with a quota of two cores each step
would wait for threads that are not scheduled. Reads cgroup v2 (one folder) and v1 (a folder per controller), both of
which show the container's own limits.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
WAIT_POLICY = "PASSIVE"
"""OMP_WAIT_POLICY of torch's CPU threads between two parallel regions. Spinning threads starve each other when the
cores are shared: on 2 cores under a load of 8, 24 tokens took 32 s spinning and 2 s passive, with 15 s and 1.7 s of
processor time."""


def wait_passively() -> None:
    """Lets torch's threads sleep while they wait, unless the environment decides. Comes before torch's import."""
    os.environ.setdefault("OMP_WAIT_POLICY", WAIT_POLICY)


def usable_cores(cgroup: Path = CGROUP) -> int:
    """The cores of the process's affinity mask, or its CPU quota, whichever is less; at least 1."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def usable_memory_bytes(cgroup: Path = CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can still be allocated: the machine's available memory, or the rest of the cgroup's limit, if less."""
    lines = (line.split() for line in meminfo.read_text().splitlines())
    available = next(int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:")
    left = _memory_left_bytes(cgroup)
    return available if left is None else max(0, min(available, left))


def _memory_left_bytes(cgroup: Path) -> int | None:
    """The rest of the cgroup's memory limit, None without one. Version 1 reports a huge number for "unlimited"."""
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(cgroup / limit_file), _read(cgroup / used_file)
        if limit.isdecimal() and used.isdecimal():
            return int(limit) - int(used)
    return None


def _quota(cgroup: Path) -> float | None:
    """The CPU quota in cores; None without a quota ("max" in version 2, -1 in version 1) or a cgroup."""
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
