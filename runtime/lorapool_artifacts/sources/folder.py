"""A local folder: a mounted claim (`pvc://`), a fetched artifact, or a folder that a person named.

Symbolic links are followed as long as they stay inside the volume; see `beneath`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.causes import refusal
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile
from lorapool_artifacts.sources.base import CHUNK_BYTES, changed
from lorapool_artifacts.sources.beneath import FolderBeneath, LinkLeadsOutError

MAX_ENTRIES = 10_000
MAX_DEPTH = 3
"""Levels of sub folders whose files are listed where the folder itself has no weights."""
REVISION_PREFIX = "stat-"


class FolderSource:
    """The files of one folder. The revision is a hash of their names, sizes and modification times."""

    def __init__(self, folder: FolderBeneath, where: str, deadline: Deadline | None) -> None:
        self._folder = folder
        self._deadline = deadline
        self.where = where
        try:
            self._stats = dict(self._scan())
        except BaseException:
            self.close()
            raise
        lines = (f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n" for name, info in sorted(self._stats.items()))
        self.revision = f"{REVISION_PREFIX}{hashlib.sha256(''.join(lines).encode()).hexdigest()[:32]}"

    @classmethod
    def open(
        cls,
        root: Path,
        parts: Sequence[str] = (),
        *,
        boundary: int = 0,
        where: str | None = None,
        deadline: Deadline | None = None,
    ) -> FolderSource:
        """Opens the folder `root`/`parts`. `root` is trusted, `parts` are not. Links stay below the root and the first
        `boundary` parts. Raises ArtifactError."""
        where = where or str(root)
        for part in parts:
            if part in ("", ".", "..") or "/" in part:
                raise ArtifactError(FailureReason.INVALID_SOURCE, f"{where}: {part!r} is not a folder name.")
        with translated(where, "the folder"):
            folder = FolderBeneath(root)
            try:
                folder.enter(parts[:boundary])
                folder.become_root()
                folder.enter(parts[boundary:])
            except BaseException:
                folder.close()
                raise
        return cls(folder, where, deadline)

    def list_files(self) -> Sequence[RemoteFile]:
        files = [RemoteFile(name, info.st_size) for name, info in self._stats.items()]
        if not any(name.endswith(".safetensors") for name in self._stats):
            files += (RemoteFile(path, 0) for path in self._nested() if "/" in path)
        return files

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        known = self._stats[name]
        with translated(self.where, name):
            descriptor = self._folder.open_file(name)
        with open(descriptor, "rb", buffering=0) as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or (found.st_size, found.st_mtime_ns) != (
                known.st_size,
                known.st_mtime_ns,
            ):
                raise changed(self.where, name)
            file.seek(start)
            left = found.st_size - start if length is None else length
            while left > 0:
                if self._deadline is not None:
                    self._deadline.check()
                with translated(self.where, name):
                    chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    return
                if self._deadline is not None:
                    self._deadline.progress()
                left -= len(chunk)
                yield chunk

    def close(self) -> None:
        self._folder.close()

    def __del__(self) -> None:
        self.close()

    def _scan(self) -> Iterator[tuple[str, os.stat_result]]:
        with translated(self.where, "the folder"), self._entries("") as entries:
            for count, entry in enumerate(entries):
                if count >= MAX_ENTRIES:
                    raise ArtifactError(FailureReason.TOO_LARGE, f"{self.where} holds more than {MAX_ENTRIES} entries.")
                info: os.stat_result | None = entry.stat(follow_symlinks=False)
                if entry.is_symlink():
                    info = self._behind_link(entry.name)
                if info is not None and stat.S_ISREG(info.st_mode):
                    yield entry.name, info

    def _behind_link(self, name: str) -> os.stat_result | None:
        """What a link leads to. None for a link that leads out, if no file of that kind is ever read."""
        try:
            descriptor = self._folder.open_file(name)
        except (LinkLeadsOutError, OSError):
            if name.endswith((".json", ".safetensors")):
                raise refusal("link-out", where=self.where, file=name) from None
            return None
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def _nested(self) -> Iterator[str]:
        """Paths of the files in sub folders, of the first entries only and without following links."""
        pending, left = [""], MAX_ENTRIES
        while pending and left > 0:
            path = pending.pop(0)
            with contextlib.suppress(OSError), self._entries(path) as entries:
                for entry in itertools.islice(entries, left):
                    left -= 1
                    if not entry.is_dir(follow_symlinks=False):
                        yield path + entry.name
                    elif path.count("/") < MAX_DEPTH:
                        pending.append(f"{path}{entry.name}/")

    @contextlib.contextmanager
    def _entries(self, path: str) -> Iterator[Iterator[os.DirEntry[str]]]:
        descriptor = self._folder.open_folder(path)
        try:
            with os.scandir(descriptor) as entries:
                yield entries
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def translated(where: str, what: str) -> Iterator[None]:
    """Turns OSErrors into ArtifactErrors, by error number."""
    try:
        yield
    except LinkLeadsOutError as error:
        raise refusal("link-out", where=where, file=what) from error
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR):
            raise ArtifactError(
                FailureReason.SOURCE_NOT_FOUND, f"{where}: {what} does not exist; check the path."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ArtifactError(
                FailureReason.UNAUTHORIZED,
                f"{where}: {what} may not be read; make it readable for the runtime's user (fsGroup).",
            ) from error
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE, f"{where}: {what} cannot be read: {error.strerror}."
        ) from error
