"""Removes folders of tens of thousands of files, which is what containerd leaves of an image.

Each removal waits for the disk, so many run concurrently. Links are removed and never followed.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

AT_ONCE = 16


def remove(root: Path) -> None:
    """Removes the folder and everything below it."""
    files: list[str] = []
    levels: dict[int, list[str]] = {}
    for folder, folders, names in os.walk(root):
        inside = [os.path.join(folder, name) for name in folders]
        files += [os.path.join(folder, name) for name in names] + [path for path in inside if os.path.islink(path)]
        levels.setdefault(folder.count(os.sep), []).append(folder)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(os.unlink, files))
        for depth in sorted(levels, reverse=True):
            list(pool.map(os.rmdir, levels[depth]))
