"""Folders that one writer fills, in a cache that several pods may share: who fills one, and who was killed meanwhile.

A writer locks a file next to its folder and touches it every few seconds. Another writer is dead only if its lock is
free and, since not every shared volume carries locks from node to node, also untouched for longer than any living
writer would leave it. A writer of the same host, which is to say of the same pod before its container was restarted,
needs no such proof: a lock is always known on its own machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"
"""Start of the name of a folder that is worth nothing without its writer."""
PARTIAL = ".part-"
"""Start of the name of a folder whose finished files another writer may use."""
LOCK = ".lock"
TOUCH_S = 10.0
DEAD_AFTER_S = 120.0
FORGOTTEN_AFTER_S = 24 * 3600.0
"""A partial folder that no writer continued for this long is removed."""


@contextlib.contextmanager
def temporary_folder(root: Path) -> Iterator[Path]:
    """A new folder of this writer, removed when the context ends."""
    folder = root / f"{TEMPORARY}{secrets.token_hex(8)}"
    with _locked(folder):
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def partial_folder(root: Path, key: str) -> Iterator[Path]:
    """A folder of this writer with the files that a dead writer of the same key finished. It stays when the context
    ends, unless it was renamed."""
    folder = root / f"{PARTIAL}{key}-{secrets.token_hex(8)}"
    with _locked(folder):
        for lock in _locks(root, f"{PARTIAL}{key}-"):
            if lock != _lock_of(folder) and is_dead(lock):
                with contextlib.suppress(OSError):  # another writer was quicker, or there is one already
                    _folder_of(lock).rename(folder)
                _remove(lock)
        folder.mkdir(exist_ok=True)
        yield folder


def living_writer(root: Path, key: str) -> Path | None:
    """The folder that another writer fills for the key at this time."""
    return next((_folder_of(lock) for lock in _locks(root, f"{PARTIAL}{key}-") if not is_dead(lock)), None)


def remove_dead(root: Path) -> int:
    """Removes the temporary folders of dead writers, and partial ones that no writer continued. Returns their number.

    Blocks. The folders of living writers, in any process, are not touched.
    """
    removed = 0
    for lock in [*_locks(root, TEMPORARY), *_locks(root, PARTIAL)]:
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if is_dead(lock) and (lock.name.startswith(TEMPORARY) or _untouched_s(lock) > FORGOTTEN_AFTER_S):
                _remove(lock)
                removed += 1
    for folder in root.glob(f"{TEMPORARY}*"):
        if folder.is_dir() and not _lock_of(folder).exists():
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def is_dead(lock: Path) -> bool:
    """Whether the writer that made the lock file has ended."""
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = file.read() == _host()
        return is_ours or _untouched_s(lock) > DEAD_AFTER_S
    except (BlockingIOError, FileNotFoundError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the file next to the folder and touches it until the context ends. Then it is removed."""
    lock, ended = _lock_of(folder), threading.Event()
    # locked and complete before it has the name by which others find it
    fresh = lock.with_name(f"{lock.name}-new")
    with fresh.open("xb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write(_host())
        held.flush()
        fresh.rename(lock)
        touching = threading.Thread(target=_touch, args=(lock, ended), name="touch-lock", daemon=True)
        touching.start()
        try:
            yield
        finally:
            ended.set()
            touching.join()
            if not folder.exists():
                lock.unlink(missing_ok=True)


def _touch(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_S):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _untouched_s(lock: Path) -> float:
    """Seconds since the file was touched, by the clock of the volume."""
    probe = lock.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{LOCK}-new")
    try:
        probe.touch()
        return probe.stat().st_mtime - lock.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _host() -> bytes:
    return socket.gethostname().encode()


def _locks(root: Path, start: str) -> list[Path]:
    return sorted(root.glob(f"{start}*{LOCK}"))


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + LOCK)


def _folder_of(lock: Path) -> Path:
    return lock.with_name(lock.name.removesuffix(LOCK))


def _remove(lock: Path) -> None:
    shutil.rmtree(_folder_of(lock), ignore_errors=True)
    lock.unlink(missing_ok=True)
