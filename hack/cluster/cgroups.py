"""The one thing of a cluster that outlives its processes: a cgroup per tree, under a name of its own.

`lifecycle` makes it before the kubelet starts (which wants it to be there) and removes it after everything in it died.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path

from cluster.errors import StartFailed
from cluster.say import say

TREES = Path("/sys/fs/cgroup")


def root(state: Path) -> str:
    """Named by the folder, so that two checkouts with a cluster of one name do not meet."""
    return f"/lorapool-{hashlib.sha256(str(state).encode()).hexdigest()[:10]}"


def _hierarchies() -> list[Path]:
    """Version 1 has one tree per controller, version 2 one for all."""
    if (TREES / "cgroup.controllers").exists():
        return [TREES]
    return [p for p in TREES.iterdir() if p.is_dir() and not p.is_symlink() and (p / "cgroup.procs").exists()]


def make(name: str) -> None:
    """The kubelet wants its root to be there in every tree, with the controllers it uses."""
    for tree in _hierarchies():
        folder = tree / name.strip("/")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise StartFailed(
                f"cannot make the cgroup {folder}: {error.strerror}",
                remedy="root must be allowed to write to /sys/fs/cgroup (in a container: run it privileged)",
            ) from None
        if (tree / "cgroup.controllers").exists():  # version 2: a child has what its parent hands down
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
                    say(f"left behind: {top}, which still has processes")
                    break
                time.sleep(0.05)
