"""Paths: the cache that all clusters share, and the state folder of one cluster. Creates nothing."""

import os
import re
from pathlib import Path

HACK = Path(__file__).resolve().parent.parent
REPOSITORY = HACK.parent
GO_SOURCES = HACK / "cluster" / "go"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")


def cache_dir() -> Path:
    """`$LORAPOOL_CACHE`, else the user's cache folder: programs by version, the registry's blobs, base images."""
    if own := os.environ.get("LORAPOOL_CACHE"):
        return Path(own).resolve()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).resolve() / "lorapool"


def state_dir(name: str, override: str | None = None) -> Path:
    """The folder of one cluster; `down --purge` removes it."""
    if override:
        return Path(override).resolve()
    root = os.environ.get("LORAPOOL_CLUSTERS")
    return (Path(root).resolve() if root else REPOSITORY / ".cluster") / name


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16_384))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
