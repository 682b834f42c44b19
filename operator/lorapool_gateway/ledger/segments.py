"""The files of a journal: segments of lines, each with its CRC-32.

    <journal>/<boot id>/lock                     held by the process as long as it lives
                       /through                  number of the last record that the ledger has; a hint
                       /<first number>.log       lines: 8 hex digits, a space, JSON (`records.Line`), a newline
                       /*.spare                  files without records that are used again
    <journal>/damaged/<boot id>.log              damaged lines, as they were found

A segment of a process that lives, or was killed, ends with zeros: disk space that it has not used. Only a process that
is killed while it copies a line, or a machine that crashes, leaves a torn one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import msgspec

from lorapool_gateway.ledger.records import decode_line, parties_of

DAMAGED = "damaged"
DAMAGED_MAX_BYTES = 2**20
"""Damaged lines of one process that are kept aside."""
LINE_HEAD = 9
"""Bytes of a line before its body."""


def line_of(body: bytes) -> bytes:
    return b"%08x %b\n" % (crc32(body), body)


def body_of(line: bytes) -> bytes | None:
    """The body of a line without its newline; None if the line is damaged."""
    body = line[LINE_HEAD:]
    return body if line[:LINE_HEAD] == b"%08x " % crc32(body) else None


def lock(folder: Path) -> int | None:
    """Locks the folder of a process; None if another process holds it. Closing the descriptor unlocks it."""
    held = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return None
    return held


def segments(folder: Path) -> list[Path]:
    """The segments of a process, oldest first."""
    return sorted(folder.glob("*.log"))


def first_of(segment: Path) -> int:
    """The number of the first record that may be in a segment."""
    return int(segment.stem)


def segment_path(folder: Path, first: int) -> Path:
    return folder / f"{first:016d}.log"


def through_of(folder: Path) -> int:
    """The number up to which the ledger has the records, as far as the hint says."""
    try:
        return int((folder / "through").read_text())
    except (OSError, ValueError):
        return 0


def open_through(folder: Path) -> int:
    """The file of the hint, for `note_through`."""
    return os.open(folder / "through", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def note_through(descriptor: int, through: int) -> None:
    os.pwrite(descriptor, b"%020d" % through, 0)


def forget(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@dataclass(slots=True)
class Chunk:
    """Records that follow each other without a gap."""

    first: int = 0
    last: int = 0
    bodies: list[bytes] = field(default_factory=list)
    """Encoded records, in groups of one or more that are separated by commas."""
    lost_before: int = 0
    """Above 0: the record before `first` cannot be read any more."""
    parties: Mapping[int, bytes] = field(default_factory=dict)
    """The encoded parties to which the records refer."""


@dataclass(slots=True)
class Reader:
    """Reads the records of one process in order, after those that the ledger has."""

    folder: Path
    after: int = 0
    """Number of the last record that was read."""
    damaged: int = 0
    """Lines whose sum is wrong."""
    torn: int = 0
    """Lines without an end."""
    pending: Chunk | None = None
    """What was read last and is not committed."""
    _segment: Path | None = None
    _offset: int = 0
    _parties: dict[Path, dict[int, bytes]] = field(default_factory=dict)
    """By segment, the parties that were read so far, by their numbers."""

    def seek(self, after: int) -> None:
        """Continues with the record after this one, or with the oldest that is kept."""
        self.after, self.pending, self._segment, self._offset = after, None, None, 0

    def read(self, until: int | None, size: int, most: int) -> Chunk:
        """At most `most` records up to number `until` (None: all, since the writer is dead), of about `size` bytes."""
        chunk, read, named = Chunk(), 0, dict[int, bytes]()
        for number, body, parties, place in self._records(until is None):
            if number <= self.after:
                self._segment, self._offset = place
                continue
            if until is not None and number > until:
                break
            if number != self.after + 1:
                if chunk.bodies:
                    break  # it is read again as the first of the next chunk
                chunk.lost_before = number
            chunk.first = chunk.first or number
            chunk.last = self.after = number
            chunk.bodies.append(body)
            self._segment, self._offset = place
            read += len(body) + sum(len(parties[new]) for new in parties.keys() - named.keys())
            named |= parties
            if len(chunk.bodies) >= most or read >= size or number == until:
                break
        chunk.parties = named
        return chunk

    def _records(self, dead: bool) -> Iterator[tuple[int, bytes, Mapping[int, bytes], tuple[Path, int]]]:
        """Undamaged records from the present place on: number, body, parties, and where to read what follows."""
        found = segments(self.folder)
        self._parties = {segment: kept for segment, kept in self._parties.items() if segment in found}
        if self._segment is None:
            older = [item for item in found if first_of(item) <= self.after + 1]
            self._segment, self._offset = (older[-1] if older else (found[0] if found else None)), 0
        for segment in found:
            if self._segment is not None and segment < self._segment:
                continue
            offset = self._offset if segment == self._segment else 0
            known = self._parties.setdefault(segment, {})
            for line, begin, end in _lines(segment, offset):
                decoded = _decoded(line, known)
                if decoded is not None:
                    first, records = decoded
                    last = first + len(records) - 1
                    for number, (body, name) in enumerate(records, first):
                        parties = {name: known[name]} if name else {}
                        yield number, body, parties, (segment, end if number == last else begin)
                elif dead or line.endswith(b"\n"):
                    self._set_aside(line)
                    self._segment, self._offset = segment, end

    def _set_aside(self, line: bytes) -> None:
        if line.endswith(b"\n"):
            self.damaged += 1
        else:
            self.torn += 1
        folder = self.folder.parent / DAMAGED
        folder.mkdir(exist_ok=True)
        path = folder / f"{self.folder.name}.log"
        if not path.exists() or path.stat().st_size + len(line) <= DAMAGED_MAX_BYTES:
            with path.open("ab") as kept:
                kept.write(line)


def _decoded(line: bytes, parties: dict[int, bytes]) -> tuple[int, list[tuple[bytes, int]]] | None:
    """The number of the line's first record, and each record with the number of its parties, 0 for none.

    The line's parties are added to those of the lines before. None: the line, or one that it needs, is damaged.
    """
    body = body_of(line[:-1]) if line.endswith(b"\n") else None
    if body is None:
        return None
    try:
        decoded = decode_line(body)
        parties |= {number: bytes(encoded) for number, encoded in decoded.parties.items()}
        records = [(bytes(record), parties_of(record)) for record in decoded.records]
    except msgspec.MsgspecError:
        return None
    return (decoded.first, records) if all(not name or name in parties for _, name in records) else None


def _lines(segment: Path, offset: int) -> Iterator[tuple[bytes, int, int]]:
    """Lines with their newlines, each with its own offset and that after it. A torn one has no newline."""
    content = segment.read_bytes()
    while offset < len(content):
        if not content[offset]:  # not used, or never written before the machine crashed
            offset = len(content) - len(content[offset:].lstrip(b"\0"))
            continue
        end = content.find(b"\n", offset) + 1 or len(content)
        yield content[offset:end].rstrip(b"\0"), offset, end
        offset = end
