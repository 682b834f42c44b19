"""The disk cache: one folder per digest; the least recently used are evicted when it is full.

One runtime process owns a cache. Above `high_bytes`, folders are removed until `low_bytes` are reached. A pinned
digest is never removed. The last use is stored as the folder's modification time, so that it survives a restart. An
artifact is refused only when it does not fit after every unpinned folder is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.fetch import (
    ResolvedArtifact,
    check_room,
    disk_errors,
    fetch,
    folder_digest,
    present_folder,
)
from lorapool_artifacts.writer_folders import TEMPORARY, remove_dead


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One folder of the cache."""

    digest: str
    size_bytes: int
    used_at_s: float


def plan_eviction(
    entries: list[CacheEntry], pinned: frozenset[str], *, used_bytes: int, target_bytes: int
) -> tuple[list[CacheEntry], int]:
    """The entries to evict, least recently used first, and the bytes that remain. Pure."""
    leaving = []
    for entry in sorted(entries, key=lambda item: (item.used_at_s, item.digest)):
        if used_bytes <= target_bytes:
            break
        if entry.digest not in pinned:
            leaving.append(entry)
            used_bytes -= entry.size_bytes
    return leaving, used_bytes


class DiskCache:
    """Folders named by digest in `root`. Not thread-safe: used from one event loop."""

    def __init__(self, root: Path, *, high_bytes: int, low_bytes: int) -> None:
        if not 0 < low_bytes <= high_bytes:
            raise ValueError(f"watermarks must be 0 < low ({low_bytes}) <= high ({high_bytes})")
        self.root = root
        self._high_bytes = high_bytes
        self._low_bytes = low_bytes
        self._pins: Counter[str] = Counter()

    def start(self) -> int:
        """Creates the folder and removes the leftovers of a killed process. Blocks. Returns the number removed."""
        self.root.mkdir(parents=True, exist_ok=True)
        return remove_dead(self.root)

    def get(self, digest: str) -> Path | None:
        """The folder of a digest, or None. Does not count as a use."""
        return present_folder(self.root, digest)

    def touch(self, digest: str) -> None:
        """Records that the folder is used now."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / digest.removeprefix("sha256:"))

    @contextlib.contextmanager
    def pinned(self, digest: str) -> Iterator[None]:
        """Keeps the folder from being evicted inside the context. May be nested."""
        self.pin(digest)
        try:
            yield
        finally:
            self.unpin(digest)

    def pin(self, digest: str) -> None:
        """Keeps the folder from being evicted until `unpin` was called as often."""
        self._pins[digest] += 1

    def unpin(self, digest: str) -> None:
        """Undoes one `pin`. Raises ValueError when the digest is not pinned."""
        if self._pins[digest] <= 0:
            raise ValueError(f"{digest} is not pinned")
        self._pins[digest] -= 1

    def entries(self) -> list[CacheEntry]:
        """All folders of the cache. Blocks briefly."""
        found = []
        for path in self.root.iterdir():
            if present_folder(self.root, path.name) is not None:
                with contextlib.suppress(FileNotFoundError):
                    size_bytes = sum(file.stat().st_size for file in path.iterdir())
                    found.append(CacheEntry(folder_digest(path), size_bytes, path.stat().st_mtime))
        return found

    def used_bytes(self) -> int:
        """Bytes of all folders together. Blocks briefly."""
        return sum(entry.size_bytes for entry in self.entries())

    async def obtain(self, resolved: ResolvedArtifact, expected_digest: str | None = None) -> Path:
        """The artifact's folder; when it is missing, makes room and fetches it. Raises ArtifactError."""
        digest = resolved.digest or expected_digest
        with self.pinned(digest) if digest is not None else contextlib.nullcontext():
            if digest is None or self.get(digest) is None:
                await asyncio.to_thread(self._make_room, resolved.size_bytes)
            try:
                path = await fetch(resolved, self.root, expected_digest)
            except ArtifactError as error:
                if error.reason is not FailureReason.DISK_FULL or not await asyncio.to_thread(self.evict, 0):
                    raise
                path = await fetch(resolved, self.root, expected_digest)
        self.touch(folder_digest(path))
        return path

    def evict(self, target_bytes: int) -> int:
        """Removes the least recently used folders until `target_bytes` remain. Blocks. Returns the bytes freed."""
        entries = self.entries()
        used_bytes = sum(entry.size_bytes for entry in entries)
        leaving, left_bytes = plan_eviction(
            entries, self._pinned_now(), used_bytes=used_bytes, target_bytes=target_bytes
        )
        for entry in leaving:
            self._remove(entry.digest)
        return used_bytes - left_bytes

    def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self._high_bytes:
            raise ArtifactError(
                FailureReason.DISK_FULL,
                f"The artifact is {size_bytes} bytes and the runtime's disk cache holds {self._high_bytes}; raise "
                "cacheSizeLimit of the runtime profile.",
            )
        if self.used_bytes() + size_bytes > self._high_bytes:
            self.evict(max(0, min(self._low_bytes, self._high_bytes - size_bytes)))
        with disk_errors(self.root):
            try:
                check_room(self.root, size_bytes)
            except ArtifactError:
                self.evict(max(0, self.used_bytes() - size_bytes))
                check_room(self.root, size_bytes)
        if self.used_bytes() + size_bytes > self._high_bytes:
            raise ArtifactError(
                FailureReason.DISK_FULL,
                f"The runtime's disk cache holds {self._high_bytes} bytes and everything in it is in use; raise "
                "cacheSizeLimit of the runtime profile or use fewer adapters.",
            )

    def _pinned_now(self) -> frozenset[str]:
        return frozenset(digest for digest, count in self._pins.items() if count > 0)

    def _remove(self, digest: str) -> None:
        """Renames the folder before deleting it: a crash leaves a leftover, never an incomplete folder."""
        path = self.root / digest.removeprefix("sha256:")
        trash = self.root / f"{TEMPORARY}trash-{secrets.token_hex(8)}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
