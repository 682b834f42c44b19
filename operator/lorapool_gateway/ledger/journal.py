"""The journal of one gateway process. Records are copied into a mapped file, without a call of the system.

What is in a mapped file belongs to the page cache: a killed process loses nothing of it. A segment gets all of its disk
space when it begins, so that a full disk is noticed there and never in the middle of a record. The file of a segment
that the ledger has is used again: its memory is there already, and new memory costs more than all else of a record.

A record that cannot be kept, since the disk is full or the journal is as large as it may be, is counted and given up;
the request goes on, and the runtime's record of it still bills. Numbers are given to kept records only, so that a
failure leaves no gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lorapool_api.settings import SettingsError
from lorapool_gateway.ledger import segments
from lorapool_gateway.ledger.records import Opened, Record, encode, encode_line
from lorapool_gateway.ledger.segments import Chunk, line_of

log = logging.getLogger(__name__)

SEGMENT_BYTES = 2**20
KEPT_BYTES = SEGMENT_BYTES // 4
"""When the ledger has all records and the segment is larger, the next one begins."""
SPARES = 4
"""Files that wait to be used again."""
SYNC_S = 1.0
"""A crash of the machine loses the records of at most about this long. A crash of the process loses none."""
MARK_RECORDS = 256
LINE_RECORDS = 100
"""At most so many records share a line and its checksum."""
RECENT_BYTES = 2**20
"""Records that are kept in memory until they are sent; older ones are read from the files."""
DISK, FULL = "disk", "full"
"""Why a record was given up."""
_BOOT_ID = re.compile("[0-9a-f]{32}")


class Segment:
    """A file of one size in memory, in which lines are written."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        """Raises OSError."""
        self.path = path
        self.descriptor = descriptor
        self.map = mmap.mmap(descriptor, size)
        self.first = 0
        """Number of its first record."""
        self.used = 0
        """Bytes of its lines, once no more are written."""

    @classmethod
    def new(cls, folder: Path, size: int) -> Segment:
        """Makes a file with all of its disk space. Raises OSError."""
        path = folder / f"{uuid.uuid4().hex}.spare"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
            return cls(path, descriptor, size)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise

    def begin(self, first: int) -> None:
        """Gives it the name of a segment that begins with this record. Raises OSError."""
        path = segments.segment_path(self.path.parent, first)
        self.path.rename(path)
        self.path, self.first = path, first

    def empty(self) -> None:
        """Makes it a file that can begin again. Raises OSError."""
        self.map[: self.used] = bytes(self.used)
        path = self.path.with_suffix(".spare")
        self.path.rename(path)
        self.path, self.used = path, 0

    def close(self) -> None:
        """Closes it without the space that it does not need."""
        self.map.close()
        with contextlib.suppress(OSError):
            os.ftruncate(self.descriptor, self.used)
        os.close(self.descriptor)

    def delete(self) -> None:
        """Closes and deletes it. Raises OSError."""
        self.map.close()
        os.close(self.descriptor)
        self.path.unlink(missing_ok=True)


class _Group(NamedTuple):
    """Records that were written together."""

    first: int
    last: int
    body: bytes
    parties: dict[int, bytes]


class Journal:
    def __init__(
        self,
        root: Path,
        max_bytes: int,
        lost: Callable[[str], None] = lambda why: None,
        *,
        now_unix_s: Callable[[], float] = time.time,
    ) -> None:
        """Begins a new journal in a folder of its own below `root`. Raises SettingsError if that is not possible.

        `lost(why)` is called for every record that is given up.
        """
        self.boot_id = uuid.uuid4().hex
        self.folder = root / self.boot_id
        self.seq = 0
        """Number of the last record."""
        self.max_bytes = max_bytes
        self._segment_bytes = min(SEGMENT_BYTES, max_bytes // 8)
        self.through = 0
        """Number up to which the ledger has the records."""
        self.written = asyncio.Event()
        """Set when there is a full batch to send."""
        self.batch = 1000
        self._lost = lost
        self._now_unix_s = now_unix_s
        self._marks: deque[tuple[int, float]] = deque()
        """Numbers of some records with the times at which they were written, of the oldest that is unsent first."""
        self._mark_at = 1
        """Number of the next record after which there is more to do than to copy it."""
        self._older: deque[Segment] = deque()
        """The segments before the present one, the oldest first."""
        self._spares: list[Segment] = []
        self._unsynced: list[int] = []
        """Descriptors of segments before the present one that may be in memory only."""
        self._synced = 0
        """Number of the last record before which all are on the disk."""
        self._used = self._room = 0
        """Bytes of the present segment that have records, and that may have some."""
        self._named: set[int] = set()
        """Numbers of the parties of attempts that it has."""
        self._recent: deque[_Group] = deque()
        """What the ledger may not have yet, the oldest first, of at most RECENT_BYTES."""
        self._recent_bytes = 0
        self._failing = self._ended = False
        try:
            self.folder.mkdir(parents=True, mode=0o700)
            self._lock, self._hint = segments.lock(self.folder), segments.open_through(self.folder)
            self.others = sum(path.stat().st_size for path in root.glob("*/*.log"))
            """Bytes of journals of earlier processes, and of damaged lines, in the same folder."""
            self._segment = self._made()
        except OSError as error:
            raise SettingsError(
                f"the journal cannot be written to {root}: {error.strerror}. Make the folder writable, or unset "
                "LORAPOOL_GATEWAY_JOURNAL_DIR to run without one."
            ) from None

    @property
    def size(self) -> int:
        """Bytes of all records."""
        return sum(segment.used for segment in self._older) + self._used

    @property
    def unsent(self) -> int:
        """Records that the ledger does not have."""
        return self.seq - self.through

    @property
    def lag_s(self) -> float:
        """Age of the oldest record that the ledger does not have, or of one a few hundred before it."""
        return max(0.0, self._now_unix_s() - self._marks[0][1]) if self._marks else 0.0

    def append(self, record: Record) -> bool:
        """Keeps a record under the next number; False if it was given up."""
        return not self.write([record], {})

    def write(self, records: Sequence[Record], parties: Mapping[int, bytes]) -> list[Record]:
        """Keeps records under the next numbers; returns those that were given up. `parties` are those they refer to."""
        lost: list[Record] = []
        for begin in range(0, len(records), LINE_RECORDS):
            lost += self._write_line(records[begin : begin + LINE_RECORDS], parties)
        return lost

    def _write_line(self, records: Sequence[Record], parties: Mapping[int, bytes]) -> Sequence[Record]:
        first = number = self.seq + 1
        named: dict[int, bytes] = {}
        for record in records:
            record.seq = number
            number += 1
            if type(record) is Opened:
                named[record.parties] = parties[record.parties]
        body = encode(records)
        while True:
            new = {name: encoded for name, encoded in named.items() if name not in self._named}
            line = line_of(encode_line(first, new, body))
            end = self._used + len(line)
            if end <= self._room:
                break
            if len(line) > self._segment_bytes and (half := len(records) // 2):
                return [*self._write_line(records[:half], parties), *self._write_line(records[half:], parties)]
            if not self._next_segment(len(records)):
                return records
        self._map[self._used : end] = line
        self._used, self.seq = end, number - 1
        self._named.update(new)
        self._recent.append(_Group(first, self.seq, body, named))
        self._recent_bytes += len(body)
        while self._recent_bytes > RECENT_BYTES:
            self._forget_first()
        if self.seq >= self._mark_at:
            self._mark()
        return ()

    def _mark(self) -> None:
        """Notes the time of a record, and that a batch is full."""
        number, full = self.seq, self.through + self.batch
        if not self._marks or number // MARK_RECORDS > self._marks[-1][0] // MARK_RECORDS:
            self._marks.append((number, self._now_unix_s()))
        self._mark_at = number - number % MARK_RECORDS + MARK_RECORDS
        if number >= full:
            self.written.set()
        else:
            self._mark_at = min(self._mark_at, full)

    def recent(self, after: int, most: int) -> Chunk | None:
        """At most `most` records after this number, if they are in memory; else None."""
        while self._recent and self._recent[0].last <= after:
            self._forget_first()
        if not self._recent or self._recent[0].first != after + 1:
            return None
        chunk, parties = Chunk(after + 1), dict[int, bytes]()
        for group in self._recent:
            if group.last - after > most:
                break
            chunk.last = group.last
            chunk.bodies.append(group.body)
            parties |= group.parties
        chunk.parties = parties
        return chunk if chunk.bodies else None

    def _forget_first(self) -> None:
        self._recent_bytes -= len(self._recent.popleft().body)

    def cut(self, through: int) -> None:
        """Forgets the records up to this number, which the ledger has: whole segments, the oldest first."""
        self.through = max(self.through, min(through, self.seq))
        while len(self._marks) > 1 and self._marks[1][0] <= self.through + 1:
            self._marks.popleft()
        if self.through == self.seq:
            self._marks.clear()
            if self._used > KEPT_BYTES:
                with contextlib.suppress(OSError):  # it is tried again
                    self._open()
        self._mark_at = self.seq + 1
        while self._older and (self._older[1] if len(self._older) > 1 else self._segment).first <= self.through + 1:
            self._spare(self._older.popleft())
        with contextlib.suppress(OSError):
            segments.note_through(self._hint, self.through)

    async def keep_synced(self) -> None:
        """Writes to the disk in a thread what the system has in memory, until cancelled."""
        while True:
            await asyncio.sleep(SYNC_S)
            if self._synced == self.seq:
                continue
            self._synced = self.seq
            self._unsynced.append(os.dup(self._segment.descriptor))
            while self._unsynced:
                descriptor = self._unsynced.pop(0)
                try:
                    await asyncio.to_thread(os.fdatasync, descriptor)
                except OSError as error:
                    self._synced = -1
                    log.warning("the journal cannot be written to the disk", extra={"error": str(error)})
                finally:
                    os.close(descriptor)

    def ended(self) -> None:
        """Notes that the ledger has all records and knows that none follows."""
        self._ended = True

    def close(self) -> None:
        """Ends the journal. What the ledger does not have is sent by the next process that uses the folder."""
        self._segment.used = self._used
        self._room = 0
        for segment in (*self._older, self._segment, *self._spares):
            segment.close()
        for descriptor in (self._lock, self._hint, *self._unsynced):
            if descriptor is not None:
                os.close(descriptor)
        if self._ended and not self.unsent:
            segments.forget(self.folder)

    def _next_segment(self, records: int) -> bool:
        """Begins a segment if there may be one; else gives up so many records."""
        bytes_of_files = (len(self._older) + 2) * self._segment_bytes + self.others
        if not self._used or bytes_of_files > self.max_bytes:
            self._give_up(records, FULL, f"the journal has its {self.max_bytes} bytes, which the ledger does not take")
            return False
        try:
            self._open()
        except OSError as error:
            self._give_up(records, DISK, str(error))
            return False
        self._failing = False
        return True

    def _open(self) -> None:
        """Begins a segment with the next record."""
        self._segment.used = self._used
        opened = self._made()
        self._older.append(self._segment)
        self._unsynced.append(os.dup(self._segment.descriptor))
        self._segment = opened

    def _made(self) -> Segment:
        """An empty segment for the next record, whose place is used from now on. Raises OSError."""
        first = self.seq + 1
        made = self._spares.pop() if self._spares else Segment.new(self.folder, self._segment_bytes)
        try:
            made.begin(first)
        except OSError:
            made.delete()
            raise
        self._map, self._used, self._room = made.map, 0, len(made.map)
        self._named = set()
        return made

    def _spare(self, segment: Segment) -> None:
        """Keeps the file of a segment whose records the ledger has."""
        with contextlib.suppress(OSError):
            if len(self._spares) < SPARES and len(segment.map) == self._segment_bytes:
                segment.empty()
                self._spares.append(segment)
            else:
                segment.delete()

    def _give_up(self, records: int, why: str, error: str) -> None:
        for _ in range(records):
            self._lost(why)
        if not self._failing:
            self._failing = True
            log.error("records of requests are not kept; they are billed by the runtimes' half", extra={"error": error})


def predecessors(root: Path, own: str) -> list[tuple[Path, int]]:
    """The folders of processes that have ended, oldest first, each with its lock.

    Only a folder that is named like a process is one; `lost+found` of a volume is none.
    """
    found: list[tuple[float, Path, int]] = []
    for folder in root.iterdir():
        if folder.name == own or not _BOOT_ID.fullmatch(folder.name):
            continue
        try:
            held, changed_s = segments.lock(folder), folder.stat().st_mtime
        except OSError as error:
            log.warning("a journal cannot be read", extra={"folder": str(folder), "error": str(error)})
            continue
        if held is not None:
            found.append((changed_s, folder, held))
    return [(folder, held) for _, folder, held in sorted(found)]
