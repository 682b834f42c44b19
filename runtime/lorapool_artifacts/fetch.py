"""Fetches a source into a folder named by its digest, atomically.

`resolve` asks the source for its listing. `fetch` writes the files to `<cache_root>/<sha256 hex>`: into a temporary
folder first, each file bounded, hashed while written, fsynced and checked, then the folder is renamed. Concurrent
fetches of one artifact share one download within a process; between processes the first rename wins. A download that
breaks off is resumed where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline, in_thread
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ArtifactKind, RemoteFile, digest_of, select_files
from lorapool_artifacts.inspect import check_digest, check_files, check_total, parse_source
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_artifacts.sources import open_source
from lorapool_artifacts.sources.base import Source
from lorapool_artifacts.sources.folder import FolderSource
from lorapool_artifacts.uri import ArtifactUri

ATTEMPTS_PER_FILE = 4
PAUSE_S = 0.25
"""Pause before the second attempt; it doubles each time."""

TEMPORARY = ".tmp-"
LOCK = ".lock"
_FOLDER = re.compile(r"^[0-9a-f]{64}$")


@dataclass(frozen=True, slots=True)
class ResolvedArtifact:
    """A source at one revision, with the files that `fetch` would write."""

    uri: ArtifactUri
    kind: ArtifactKind
    revision: str
    files: tuple[RemoteFile, ...]
    size_bytes: int
    digest: str | None
    """None when the source does not list a hash for every file."""
    settings: SourceSettings
    limits: FetchLimits


async def resolve(
    uri: str,
    revision: str | None = None,
    kind: ArtifactKind | str = ArtifactKind.ADAPTER,
    limits: FetchLimits | None = None,
    settings: SourceSettings | None = None,
) -> ResolvedArtifact:
    """Lists the artifact at `uri` and `revision` and checks its size. Raises ArtifactError."""
    parsed, wanted, bounds, given = (
        parse_source(uri),
        ArtifactKind(kind),
        limits or FetchLimits(),
        settings or SourceSettings(),
    )
    deadline = Deadline(bounds, where=str(parsed))

    def run() -> ResolvedArtifact:
        source = open_source(parsed, revision, given, deadline)
        try:
            files = select_files(wanted, source.list_files(), where=source.where)
        finally:
            source.close()
        check_total(files, bounds.max_total_bytes, source.where)
        size_bytes = sum(file.size_bytes for file in files)
        return ResolvedArtifact(parsed, wanted, source.revision, files, size_bytes, digest_of(files), given, bounds)

    return await in_thread(deadline, run)


async def fetch(resolved: ResolvedArtifact, cache_root: Path, expected_digest: str | None = None) -> Path:
    """The folder with the artifact's files, named by the hex digits of the digest. Raises ArtifactError."""
    if resolved.digest is not None:
        check_digest(resolved.digest, expected_digest, str(resolved.uri))
    known = resolved.digest or expected_digest
    if known is not None and (present := present_folder(cache_root, known)) is not None:
        return present
    key = (str(cache_root), known or f"{resolved.uri} {resolved.revision} {resolved.kind}")
    path = await _downloads.join(key, lambda: _fetch(resolved, cache_root, known))
    check_digest(folder_digest(path), expected_digest, str(resolved.uri))
    return path


def present_folder(cache_root: Path, digest: str) -> Path | None:
    """The folder of a digest, or None when it is not in the cache."""
    path = cache_root / digest.removeprefix("sha256:")
    return path if _FOLDER.match(path.name) and path.is_dir() else None


def folder_digest(path: Path) -> str:
    """The digest that the name of a cache folder stands for."""
    return f"sha256:{path.name}"


def clean_leftovers(cache_root: Path) -> int:
    """Removes the temporary folders of killed downloads and returns their number. Blocks.

    Downloads that run in another process are not touched.
    """
    removed = 0
    for lock in cache_root.glob(f"{TEMPORARY}*{LOCK}"):
        with contextlib.suppress(BlockingIOError, FileNotFoundError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_name(lock.name.removesuffix(LOCK)), ignore_errors=True)
            lock.unlink(missing_ok=True)
            removed += 1
    for folder in cache_root.glob(f"{TEMPORARY}*"):
        if not folder.name.endswith(LOCK) and not folder.with_name(folder.name + LOCK).exists():
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


async def _fetch(resolved: ResolvedArtifact, cache_root: Path, expected_digest: str | None) -> Path:
    deadline = Deadline(resolved.limits, where=str(resolved.uri))
    return await in_thread(deadline, lambda: _fetch_blocking(resolved, cache_root, expected_digest, deadline))


def _fetch_blocking(
    resolved: ResolvedArtifact, cache_root: Path, expected_digest: str | None, deadline: Deadline
) -> Path:
    with disk_errors(cache_root):
        cache_root.mkdir(parents=True, exist_ok=True)
        check_room(cache_root, resolved.size_bytes)
    source = open_source(resolved.uri, resolved.revision, resolved.settings, deadline)
    try:
        with disk_errors(cache_root), _temporary_folder(cache_root) as folder:
            files = [_fetch_file(source, file, folder, deadline) for file in resolved.files]
            digest = digest_of(files)
            assert digest is not None  # every file was hashed
            check_digest(digest, expected_digest, source.where)
            check_files(resolved.kind, FolderSource.open(folder, where=source.where), files)
            deadline.check()
            return _publish(folder, cache_root / digest.removeprefix("sha256:"))
    finally:
        source.close()


def _fetch_file(source: Source, file: RemoteFile, folder: Path, deadline: Deadline) -> RemoteFile:
    """Writes one file and returns it with its hash. Resumes up to three times when the source breaks off."""
    total, count, attempt = hashlib.sha256(), 0, 1
    with (folder / file.name).open("xb") as out:
        while True:
            try:
                for chunk in source.stream(file.name, count) if file.size_bytes > count else ():
                    count += len(chunk)
                    if count > file.size_bytes:
                        raise _wrong_length(source, file, "longer")
                    total.update(chunk)
                    out.write(chunk)
                break
            except ArtifactError as error:
                if error.reason is not FailureReason.SOURCE_UNAVAILABLE or attempt >= ATTEMPTS_PER_FILE:
                    raise
                deadline.pause(PAUSE_S * 2 ** (attempt - 1))
                attempt += 1
        if count != file.size_bytes:
            raise _wrong_length(source, file, "shorter")
        _sync(out)
    sha256 = total.hexdigest()
    if file.sha256 is not None and sha256 != file.sha256:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"{source.where}: {file.name} arrived with another hash than the source lists; upload it again.",
        )
    return replace(file, sha256=sha256)


def _wrong_length(source: Source, file: RemoteFile, how: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.CORRUPT_ARTIFACT,
        f"{source.where}: {file.name} is {how} than the {file.size_bytes} bytes the source lists; upload it again.",
    )


def _sync(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(folder: Path, final: Path) -> Path:
    """Renames the finished folder. An existing folder of that name has the same content and is kept."""
    _sync_folder(folder)
    try:
        folder.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync_folder(final.parent)
    return final


@contextlib.contextmanager
def _temporary_folder(cache_root: Path) -> Iterator[Path]:
    """A temporary folder, marked as in use by a locked file next to it. Removed when the context ends."""
    folder = cache_root / f"{TEMPORARY}{secrets.token_hex(8)}"
    lock = folder.with_name(folder.name + LOCK)
    with lock.open("xb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def check_room(cache_root: Path, size_bytes: int) -> None:
    """Raises ArtifactError (DiskFull) when the disk has too little free space."""
    free_bytes = shutil.disk_usage(cache_root).free
    if free_bytes < size_bytes:
        raise _disk_full(f"{size_bytes} bytes are needed and {free_bytes} are free")


@contextlib.contextmanager
def disk_errors(cache_root: Path) -> Iterator[None]:
    """Turns errors of the local disk into transient ArtifactErrors: DiskFull or LoadFailed."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full("no space is left") from error
        raise ArtifactError(
            FailureReason.LOAD_FAILED, f"The cache at {cache_root} cannot be written: {error.strerror}."
        ) from error


def _disk_full(what: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.DISK_FULL,
        f"The runtime's disk cache is full: {what}; raise cacheSizeLimit of the runtime profile or use fewer adapters.",
    )


class _Downloads:
    """At most one download per key in this process. A download that has no waiter left is cancelled."""

    def __init__(self) -> None:
        self._running: dict[tuple[asyncio.AbstractEventLoop, Any], tuple[asyncio.Task[Path], list[int]]] = {}

    async def join(self, key: Any, start: Callable[[], Coroutine[Any, Any, Path]]) -> Path:
        """The result of the download of that key, started if none runs."""
        known = (asyncio.get_running_loop(), key)
        if known not in self._running:
            self._running[known] = (asyncio.create_task(start()), [0])
        task, waiters = self._running[known]
        waiters[0] += 1
        try:
            return await asyncio.shield(task)
        finally:
            waiters[0] -= 1
            if not waiters[0]:
                task.cancel()  # has no effect on a finished task
                if self._running.get(known, (None,))[0] is task:
                    del self._running[known]


_downloads = _Downloads()
