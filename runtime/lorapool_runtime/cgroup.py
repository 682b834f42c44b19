"""How many CPU cores and how much memory the container of this process allows it to use.

By default torch starts a thread for every core of the machine. In a container with a quota of two cores each step
would wait for threads that are not scheduled. Reads cgroup v2 (one folder) and v1 (a folder per controller), both of
which show the container's own limits.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


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
    """None without a limit or a cgroup. Version 1 reports "unlimited" as a number larger than any machine's memory."""
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
