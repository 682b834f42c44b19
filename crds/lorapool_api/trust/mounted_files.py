"""Files that Kubernetes mounts from Secrets and ConfigMaps, and replaces while a process runs."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[tuple[int, int, int, int], ...]


def stamp_of(*files: Path) -> Stamp | None:
    """Returns a value that differs after every change of one of the files; None while one of them is missing."""
    try:
        found = [file.stat() for file in files]
    except OSError:
        return None
    return tuple((info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for info in found)


def why_unreadable(error: BaseException) -> str:
    """Returns the reason of a failed read in a few words, without the content of the file."""
    return getattr(error, "strerror", None) or type(error).__name__
