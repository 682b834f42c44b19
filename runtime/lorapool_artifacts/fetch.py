"""Fetches a source into a folder named by its digest, atomically.

`resolve` asks the source for its listing. `fetch` writes the files to `<cache_root>/<sha256 hex>`: into a folder of its
own first, each file bounded, hashed while written, fsynced and checked, then the folder is renamed. Concurrent fetches
of one artifact share one download within a process; between processes the first rename wins. A download that breaks off
is resumed where it stopped. With `resume` that also holds for a download whose process was killed, and for another pod
on the same volume: it waits for the one that downloads already, or continues where a dead one stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline, in_thread
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ArtifactKind, RemoteFile, digest_of, files_of, select_files
from lorapool_artifacts.inspect import check_digest, check_files, check_total, parse_source
from lorapool_artifacts.settings import FetchLimits, SourceSettings
from lorapool_artifacts.sources import open_source
from lorapool_artifacts.sources.base import CHUNK_BYTES, Source
from lorapool_artifacts.sources.folder import FolderSource
from lorapool_artifacts.uri import ArtifactUri
from lorapool_artifacts.writer_folders import living_writer, partial_folder, temporary_folder

ATTEMPTS_PER_FILE = 4
PAUSE_S = 0.25
"""Pause before the second attempt; it doubles each time."""

WAIT_S = 2.0
"""Pause between two looks at another pod's download."""
FETCHED = ".fetched-"
"""Start of the name of a file with the name of the folder that a source was fetched into."""
UNFINISHED = ".unfinished"
"""End of the name of a file that is being written."""
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
        check_total(wanted, files, bounds.max_total_bytes, source.where)
        size_bytes = sum(file.size_bytes for file in files)
        return ResolvedArtifact(parsed, wanted, source.revision, files, size_bytes, digest_of(files), given, bounds)

    return await in_thread(deadline, run)


async def fetch(
    resolved: ResolvedArtifact,
    cache_root: Path,
    expected_digest: str | None = None,
    *,
    resume: bool = False,
    on_progress: Callable[[int], None] = lambda _fetched_bytes: None,
) -> Path:
    """The folder with the artifact's files, named by the hex digits of the digest. Raises ArtifactError.

    `resume`: what is fetched is kept when it fails, and what an earlier process has fetched is used. `on_progress` is
    called in a thread with the bytes that are on disk.
    """
    if resolved.kind is ArtifactKind.ADAPTER:
        resolved = replace(
            resolved, files=(files := files_of(expected_digest, resolved.files)), digest=digest_of(files)
        )
    if resolved.digest is not None:
        check_digest(resolved.digest, expected_digest, str(resolved.uri))
    known = resolved.digest or expected_digest
    if known is not None and (present := present_folder(cache_root, known)) is not None:
        return present
    key = (str(cache_root), known or f"{resolved.uri} {resolved.revision} {resolved.kind}")
    path = await _downloads.join(key, lambda: _fetch(resolved, cache_root, known, resume, on_progress))
    check_digest(folder_digest(path), expected_digest, str(resolved.uri))
    return path


def present_folder(cache_root: Path, digest: str) -> Path | None:
    """The folder of a digest, or None when it is not in the cache."""
    path = cache_root / digest.removeprefix("sha256:")
    return path if _FOLDER.match(path.name) and path.is_dir() else None


def folder_digest(path: Path) -> str:
    """The digest that the name of a cache folder stands for."""
    return f"sha256:{path.name}"


async def _fetch(
    resolved: ResolvedArtifact,
    cache_root: Path,
    expected_digest: str | None,
    resume: bool,
    on_progress: Callable[[int], None],
) -> Path:
    deadline = Deadline(resolved.limits, where=str(resolved.uri))
    download = _resumed if resume else _from_the_start
    return await in_thread(
        deadline, lambda: download(_Download(resolved, cache_root, deadline, on_progress), expected_digest)
    )


def _from_the_start(download: _Download, expected_digest: str | None) -> Path:
    with disk_errors(download.cache_root):
        download.cache_root.mkdir(parents=True, exist_ok=True)
        check_room(download.cache_root, download.resolved.size_bytes)
        with temporary_folder(download.cache_root) as folder:
            return download.run(folder, expected_digest)


def _resumed(download: _Download, expected_digest: str | None) -> Path:
    root, resolved = download.cache_root, download.resolved
    key = hashlib.sha256(f"{resolved.uri} {resolved.revision} {resolved.kind}".encode()).hexdigest()[:16]
    note = root / f"{FETCHED}{key}"
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        while (present := _noted_folder(note)) is None and (other := living_writer(root, key)) is not None:
            download.on_progress(_size_of(other))
            download.deadline.pause(WAIT_S)
        if present is not None:
            return present
        with partial_folder(root, key) as folder:
            check_room(root, resolved.size_bytes - _size_of(folder))
            path = download.run(folder, expected_digest)
            note.write_text(path.name)
            return path


def _noted_folder(note: Path) -> Path | None:
    """The folder that an earlier download of the same artifact has made: few sources list the hash of every file."""
    try:
        return present_folder(note.parent, note.read_text())
    except FileNotFoundError:
        return None


@dataclass(slots=True)
class _Download:
    """One download. All methods block."""

    resolved: ResolvedArtifact
    cache_root: Path
    deadline: Deadline
    on_progress: Callable[[int], None]
    done_bytes: int = 0
    """Bytes of the files that are complete."""

    def run(self, folder: Path, expected_digest: str | None) -> Path:
        """Fills the folder, and gives it its final name."""
        resolved, deadline = self.resolved, self.deadline
        source = open_source(resolved.uri, resolved.revision, resolved.settings, deadline)
        try:
            fetched = [self._fetch_file(source, file, folder) for file in resolved.files]
            files = self._wanted(fetched, folder, expected_digest)
            digest = digest_of(files)
            assert digest is not None  # every file was hashed
            check_digest(digest, expected_digest, source.where)
            check_files(
                resolved.kind, FolderSource.open(folder, where=source.where), files, resolved.settings.max_tensors
            )
            deadline.check()
            return _publish(folder, self.cache_root / digest.removeprefix("sha256:"))
        finally:
            source.close()

    def _wanted(self, files: list[RemoteFile], folder: Path, expected_digest: str | None) -> list[RemoteFile]:
        """The files that the digest identifies, which only these hashes may tell; the others are removed."""
        if self.resolved.kind is not ArtifactKind.ADAPTER:
            return files
        wanted = files_of(expected_digest, files)
        for file in set(files).difference(wanted):
            (folder / file.name).unlink()
        return list(wanted)

    def _fetch_file(self, source: Source, file: RemoteFile, folder: Path) -> RemoteFile:
        """Makes sure that the file is in the folder, and returns it with its hash."""
        path, unfinished = folder / file.name, folder / f"{file.name}{UNFINISHED}"
        if path.is_file():
            sha256 = file.sha256 or self._hash_of(path).hexdigest()
        else:
            was_begun = unfinished.is_file()
            sha256 = self._write(source, file, unfinished)
            if file.sha256 is not None and sha256 != file.sha256:
                unfinished.unlink()
                if was_begun:
                    return self._fetch_file(source, file, folder)
                raise ArtifactError(
                    FailureReason.CORRUPT_ARTIFACT,
                    f"{source.where}: {file.name} arrived with another hash than the source lists; upload it again.",
                )
            unfinished.rename(path)
        self.done_bytes += file.size_bytes
        self.on_progress(self.done_bytes)
        return replace(file, sha256=sha256)

    def _write(self, source: Source, file: RemoteFile, path: Path) -> str:
        """Writes what is missing of one file and returns its hash. Resumes when the source breaks off, three times."""
        total = self._hash_of(path) if path.is_file() else hashlib.sha256()
        attempt = 1
        with path.open("ab") as out:
            count = out.tell()
            while True:
                self.deadline.begin_file()
                try:
                    for chunk in source.stream(file.name, count) if file.size_bytes > count else ():
                        count += len(chunk)
                        if count > file.size_bytes:
                            break
                        total.update(chunk)
                        out.write(chunk)
                        self.deadline.received(len(chunk))
                        self.on_progress(self.done_bytes + count)
                    break
                except ArtifactError as error:
                    if error.reason is not FailureReason.SOURCE_UNAVAILABLE or attempt >= ATTEMPTS_PER_FILE:
                        raise
                    self.deadline.pause(PAUSE_S * 2 ** (attempt - 1))
                    attempt += 1
            _sync(out)
        if count != file.size_bytes:
            path.unlink()
            raise _wrong_length(source, file, "longer" if count > file.size_bytes else "shorter")
        return total.hexdigest()

    def _hash_of(self, path: Path) -> hashlib._Hash:
        """The hash of what an earlier process has written."""
        total = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self.deadline.check()
                self.deadline.progress()
                total.update(chunk)
        return total


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


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*") if file.is_file())


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
