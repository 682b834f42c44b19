"""The file of one process's usage records: one record a line, each with its CRC, only ever appended to.

A line is `<CRC-32 of the JSON in hex> <JSON>`. What os.write has taken survives SIGKILL; `sync` makes it survive the
machine. A damaged line is skipped and counted; the others are kept.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_NAME = re.compile(r"^(\d{6,})-([0-9a-zA-Z_-]{1,64})\.journal$")


def line_of(record: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(record), record)


class JournalFile:
    def __init__(self, path: Path) -> None:
        """A new, empty file. Raises OSError."""
        self.path = path
        self._fd = _create(path)
        self.bytes = 0
        self._is_dirty = False

    def append(self, lines: bytes) -> None:
        """Raises OSError where not all of it could be written: what was is a damaged line at most."""
        written = os.write(self._fd, lines)
        self.bytes += written
        self._is_dirty = True
        if written != len(lines):
            raise OSError(f"only {written} of {len(lines)} bytes could be written")

    def sync(self) -> None:
        """Waits until the disk has it. Any thread. Raises OSError."""
        if self._is_dirty:
            self._is_dirty = False
            fd = os.dup(self._fd)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Rewriting:
    """A file that is about to replace another one. `write` may be called in another thread; then `replace`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new = path.with_suffix(".new")

    def write(self, records: Iterable[bytes]) -> None:
        """Raises OSError."""
        with self._new.open("wb") as file:
            file.writelines(map(line_of, records))
            file.flush()
            os.fdatasync(file.fileno())

    def replace(self, later: Iterable[bytes], target: JournalFile | None) -> JournalFile:
        """Adds the records that came meanwhile and takes the place of `target`. Raises OSError."""
        file = JournalFile.__new__(JournalFile)
        file.path, file._is_dirty = self.path, True
        file._fd = os.open(self._new, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            file.bytes = os.fstat(file._fd).st_size
            if lines := b"".join(map(line_of, later)):
                file.append(lines)
            os.replace(self._new, self.path)
        except OSError:
            file.close()
            raise
        if target is not None:
            target.close()
        return file


def read_lines(path: Path) -> Iterator[bytes | None]:
    """The records of a file in order; None for a damaged line. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            record = line[9:-1]
            yield record if line.endswith(b"\n") and _matches(line[:9], record) else None


def ends_with_a_line(path: Path) -> bool:
    """Whether the last line was written whole, or there is none. Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        return not size or os.pread(file.fileno(), 1, size - 1) == b"\n"


def journals(folder: Path) -> list[tuple[int, str, Path]]:
    """Number, boot id and path of every journal in the folder, oldest first. Raises OSError."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return sorted((int(match[1]), match[2], path) for match, path in found)


def journal_path(folder: Path, number: int, boot_id: str) -> Path:
    return folder / f"{number:06d}-{boot_id}.journal"


def table_path(journal: Path) -> Path:
    """The running table of the same process."""
    return journal.with_suffix(".running")


def remove(journal: Path) -> None:
    """Deletes the files of a process."""
    for path in (table_path(journal), journal.with_suffix(".new"), journal):
        path.unlink(missing_ok=True)


def _matches(head: bytes, record: bytes) -> bool:
    try:
        return head[8:] == b" " and int(head[:8], 16) == zlib.crc32(record)
    except ValueError:
        return False


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
