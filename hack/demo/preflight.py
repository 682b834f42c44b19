"""What the local demo needs of the machine, checked before anything starts, and how long the last run took."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.places import REPOSITORY, cache_dir
from cluster.programs import build, install

PYTHON_NEEDED = (3, 11)
DISK_NEEDED_GIB = 25
DISK_NEEDED_AGAIN_GIB = 3
MEMORY_NEEDED_GIB = 6
TIMES = "demo-times.json"
OWN_CLUSTER = "a cluster you have: make demo CONTEXT=<name> REGISTRY=<registry you can push to>"


@dataclass(frozen=True)
class Machine:
    """What was observed of it. Sizes in GiB."""

    platform: str
    python: tuple[int, int]
    is_root: bool
    disk_free: float
    memory_available: float
    missing_packages: tuple[str, ...]
    has_apt: bool
    built: bool
    """Whether the programs of this version are in the cache, which then holds most of what the demo needs."""
    running: bool
    """Whether the demo's cluster is up, and has the memory that it needs."""

    @property
    def disk_needed(self) -> int:
        return DISK_NEEDED_AGAIN_GIB if self.built else DISK_NEEDED_GIB


def observe(*, running: bool) -> Machine:
    """Reads the machine; changes nothing."""
    cache = cache_dir()
    while not cache.exists():
        cache = cache.parent
    return Machine(
        platform=sys.platform,
        python=sys.version_info[:2],
        is_root=os.geteuid() == 0,
        disk_free=min(shutil.disk_usage(folder).free for folder in (REPOSITORY, cache)) / 2**30,
        memory_available=_available_bytes() / 2**30,
        missing_packages=tuple(install.missing_packages()),
        has_apt=install.find("apt-get") is not None,
        built=build.bin_dir().exists(),
        running=running,
    )


def _available_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return sizes.get("MemAvailable", 0)


def problems(machine: Machine) -> list[str]:
    """What keeps the demo from running here, each with its remedy. Pure."""
    if machine.platform != "linux":
        return [f"The local cluster needs Linux. On another system use {OWN_CLUSTER}"]
    found = []
    if machine.python < PYTHON_NEEDED:
        found.append(f"Python {_dotted(PYTHON_NEEDED)} is needed, this is {_dotted(machine.python)}: PYTHON=python3.11")
    if not machine.is_root:
        found.append(f"Root is needed, for a kubelet and containerd: `sudo -E make demo`, or {OWN_CLUSTER}")
    if machine.disk_free < machine.disk_needed:
        found.append(
            f"{machine.disk_needed} GiB of disk are needed, {machine.disk_free:.0f} are free: free some, or move the "
            "cache with LORAPOOL_CACHE=<folder on another disk>"
        )
    if machine.memory_available < MEMORY_NEEDED_GIB and not machine.running:
        found.append(
            f"{MEMORY_NEEDED_GIB} GiB of memory are needed, {machine.memory_available:.1f} are available: "
            "end other programs"
        )
    if machine.missing_packages and not machine.has_apt:
        found.append(
            f"There is no apt-get to install {', '.join(machine.missing_packages)}: install these programs with the "
            "machine's own package manager (the names are Debian's)"
        )
    return found


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def summary(machine: Machine, last_s: float | None) -> str:
    """The demo's first lines: what it will do, how long that took last time, what it needs. Pure."""
    work = (
        "Starts a one-node Kubernetes on this machine, installs the chart, and asks a base and five fine-tunes."
        if machine.built
        else "Compiles Kubernetes, builds the images, starts a one-node cluster, installs the chart, and asks a base\n"
        "and five fine-tunes."
    )
    time = f"took {duration(last_s)} last time" if last_s is not None else "has not run on this machine before"
    disk = f"{machine.disk_needed} GiB of disk ({machine.disk_free:.0f} free)"
    memory = f"{MEMORY_NEEDED_GIB} GiB of memory ({machine.memory_available:.0f} available)"
    return (
        f"{work} It {time}.\n"
        f"Needs root, Python {_dotted(PYTHON_NEEDED)}, {disk} and {memory}.\n"
        "Ctrl-C ends it and leaves nothing running; the next `make demo` goes on where it stopped."
    )


def duration(seconds: float) -> str:
    """Like `45 s` or `8 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def last_times() -> dict[str, float]:
    """Step -> seconds in the last run on this machine, with `total`; empty if there was none."""
    try:
        times: dict[str, float] = json.loads((cache_dir() / TIMES).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return times
