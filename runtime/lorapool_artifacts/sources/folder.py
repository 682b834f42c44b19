"""A local folder, read without following symbolic links: a mounted claim (`pvc://`) or a fetched artifact.

Every part of the path is opened relative to the one before it with O_NOFOLLOW, so that nothing inside a volume can
lead out of it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorapool_api.common import FailureReason
from lorapool_artifacts.deadline import Deadline
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import RemoteFile
from lorapool_artifacts.sources.base import CHUNK_BYTES, changed

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
MAX_ENTRIES = 10_000
REVISION_PREFIX = "stat-"


class FolderSource:
    """The files of one folder. The revision is a hash of their names, sizes and modification times."""

    def __init__(self, descriptor: int, where: str, deadline: Deadline | None) -> None:
        self._descriptor = descriptor
        self._deadline = deadline
        self.where = where
        try:
            self._stats = self._scan()
        except BaseException:
            self.close()
            raise
        lines = (f"{name}\0{info.st_size}\0{info.st_mtime_ns}\n" for name, info in sorted(self._stats.items()))
        self.revision = f"{REVISION_PREFIX}{hashlib.sha256(''.join(lines).encode()).hexdigest()[:32]}"

    @classmethod
    def open(
        cls, root: Path, parts: Sequence[str] = (), *, where: str | None = None, deadline: Deadline | None = None
    ) -> FolderSource:
        """Opens the folder `root`/`parts`. `root` is trusted, `parts` are not. Raises ArtifactError."""
        where = where or str(root)
        with translated(where, "the folder"):
            descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for part in parts:
            if part in ("", ".", "..") or "/" in part:
                os.close(descriptor)
                raise ArtifactError(FailureReason.INVALID_SOURCE, f"{where}: {part!r} is not a folder name.")
            try:
                with translated(where, f"the folder {part}"):
                    inner = os.open(part, _DIRECTORY, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = inner
        return cls(descriptor, where, deadline)

    def list_files(self) -> Sequence[RemoteFile]:
        return [RemoteFile(name, info.st_size) for name, info in self._stats.items()]

    def stream(self, name: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        known = self._stats[name]
        with translated(self.where, name):
            descriptor = os.open(name, _FILE, dir_fd=self._descriptor)
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
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _scan(self) -> dict[str, os.stat_result]:
        stats = {}
        with translated(self.where, "the folder"), os.scandir(self._descriptor) as entries:
            for count, entry in enumerate(entries):
                if count >= MAX_ENTRIES:
                    raise ArtifactError(FailureReason.TOO_LARGE, f"{self.where} holds more than {MAX_ENTRIES} entries.")
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(info.st_mode):
                    stats[entry.name] = info
                elif stat.S_ISLNK(info.st_mode) and entry.name.endswith((".json", ".safetensors")):
                    raise _is_link(self.where, entry.name)
        return stats


def _is_link(where: str, name: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.INVALID_SOURCE,
        f"{where}: {name} is a symbolic link, which is never followed; copy the file itself.",
    )


@contextlib.contextmanager
def translated(where: str, what: str) -> Iterator[None]:
    """Turns OSErrors into ArtifactErrors, by error number."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
            raise ArtifactError(
                FailureReason.SOURCE_NOT_FOUND, f"{where}: {what} does not exist; check the path."
            ) from error
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise _is_link(where, what) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise ArtifactError(
                FailureReason.UNAUTHORIZED,
                f"{where}: {what} may not be read; make it readable for the runtime's user (fsGroup).",
            ) from error
        raise ArtifactError(
            FailureReason.SOURCE_UNAVAILABLE, f"{where}: {what} cannot be read: {error.strerror}."
        ) from error
