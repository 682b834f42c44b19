"""The cluster's cgroups, which outlive its processes: one per hierarchy, made first and removed last."""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from cluster.errors import StartFailedError
from cluster.say import say

TREES = Path("/sys/fs/cgroup")


def root(state: Path) -> str:
    """The cgroup's name, derived from the folder: clusters of one name in two checkouts do not collide."""
    return f"/lorapool-{hashlib.sha256(str(state).encode()).hexdigest()[:10]}"


def _hierarchies() -> list[Path]:
    """The mounted hierarchies: version 1 has one per controller, version 2 one for all."""
    if (TREES / "cgroup.controllers").exists():
        return [TREES]
    return [p for p in TREES.iterdir() if p.is_dir() and not p.is_symlink() and (p / "cgroup.procs").exists()]


def make(name: str) -> None:
    """Makes the kubelet's root cgroup in every hierarchy, with its controllers. Raises StartFailedError."""
    for tree in _hierarchies():
        folder = tree / name.strip("/")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StartFailedError(
                f"cannot make the cgroup {folder}: {error.strerror}",
                remedy="root must be allowed to write to /sys/fs/cgroup (in a container: run it privileged)",
            ) from None
        if (
            tree / "cgroup.controllers"
        ).exists():  # version 2: a child has only the controllers that its parent enables
            for controller in (tree / "cgroup.controllers").read_text().split():
                with contextlib.suppress(OSError):
                    (tree / "cgroup.subtree_control").write_text(f"+{controller}")
        for file in ("cpuset.cpus", "cpuset.mems"):  # version 1: empty, and nothing may run in it
            if (folder / file).exists() and not (folder / file).read_text().strip() and (tree / file).exists():
                (folder / file).write_text((tree / file).read_text())


def remove(name: str) -> None:
    if not TREES.is_dir():
        return
    deadline = time.monotonic() + 5
    for tree in _hierarchies():
        top = tree / name.strip("/")
        while top.exists():
            for folder, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(folder)
                except OSError:
                    continue  # its last process is still ending
            if top.exists():
                if time.monotonic() > deadline:
                    say(f"could not remove {top}: it still has processes")
                    break
                time.sleep(0.05)
