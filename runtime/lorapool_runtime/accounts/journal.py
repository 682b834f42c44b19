"""The usage records of all processes of this pod, kept until the ledger has acknowledged them.

They are in memory, and where there is a folder on the disk too, for the next process. When more are kept than the
bounds allow, the oldest are folded into fewer with the same sums; only where that is not enough are the oldest given
up. When the disk fails, memory alone goes on, and the whole is written again once that works.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorapool_api.usage_protocol import PAGE_RECORDS, BootState, RuntimeRecord, UsagePage
from lorapool_runtime.accounts import journal_file
from lorapool_runtime.accounts.boot_records import BootRecords
from lorapool_runtime.accounts.journal_file import JournalFile, Rewriting, line_of

log = logging.getLogger(__name__)

FOLD_RECORDS = 1000
"""Folded at a time, which takes some ten milliseconds."""
PAGE_BYTES = 8 * 2**20
"""Of the records of a page, at most; minutes of a thousand adapters are long."""
COMPACT_BYTES = 2**20
"""A file is written again when more than half of it is not needed, and at least this much."""


@dataclass(slots=True)
class JournalStats:
    """What metrics show of the journal."""

    records: int = 0
    bytes: int = 0
    on_disk: bool = False
    write_errors: int = 0
    damaged_lines: int = 0
    folded_requests: int = 0
    dropped_records: int = 0


@dataclass(frozen=True, slots=True)
class JournalBounds:
    records: int
    bytes: int
    folds: bool = True
    """False: the oldest records are given up beyond the bounds, since no ledger collects them."""


class Journal:
    """`on_append` is called when records were added."""

    def __init__(
        self,
        boot_id: str,
        path: Path | None,
        earlier: Sequence[tuple[BootRecords, Path]],
        bounds: JournalBounds,
        on_append: Callable[[], None],
    ) -> None:
        """`path`: the file of this process, which is made with the first record; None: memory alone."""
        self.stats = JournalStats(on_disk=path is not None)
        self._own = BootRecords(boot_id)
        self._path = path
        self._file: JournalFile | None = None
        self._files = {boot.boot_id: path for boot, path in earlier}
        self._boots = {boot.boot_id: boot for boot, _path in earlier} | {boot_id: self._own}
        self._bounds = bounds
        self._on_append = on_append
        self._rewriting = False
        self._stale: set[str] = set()
        """Processes whose files are not folded yet as their records in memory are. A page that ended between two folded
        records would end where no one can go on in the unfolded ones, should this process be killed. So they are not
        read until the file is written; while the disk fails, all that is folded is one page."""
        for boot, _path in earlier:
            self._measure(len(boot.lines), boot.size)
        self._fit()

    # --- writing ------------------------------------------------------------------------

    @property
    def last_seq(self) -> int:
        return self._own.last_seq

    def append(self, records: Sequence[RuntimeRecord]) -> None:
        """Adds records of this process, numbered on from the last, by one write."""
        lines = [record.model_dump_json(by_alias=True).encode() for record in records]
        self._write(b"".join(map(line_of, lines)))
        for record, line in zip(records, lines, strict=True):
            self._own.add(record.seq, line)
        self._measure(len(lines), sum(map(len, lines)))
        self._fit()
        self._on_append()

    def end(self) -> None:
        """No record of this process follows."""
        self._own.ended = True
        self._on_append()

    def _write(self, lines: bytes) -> None:
        if self._path is None or (self._file is None and not self.stats.on_disk):
            return
        try:
            if self._file is None:
                self._file = JournalFile(self._path)
            self._file.append(lines)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.stats.write_errors += 1
        if self.stats.on_disk:
            log.warning(
                "usage records cannot be written and are kept in memory alone: make room on the disk of usage_dir",
                extra={"error": str(error)},
            )
        self.stats.on_disk = False
        if self._file is not None:
            self._file.close()
            self._file = None

    # --- reading ------------------------------------------------------------------------

    @property
    def states(self) -> list[BootState]:
        """All processes of which records are kept, oldest first; the last one is this process."""
        return [boot.state() for boot in self._boots.values()]

    @property
    def all_acknowledged(self) -> bool:
        return not self._own.lines

    def has_news(self, boot_id: str, after: int) -> bool:
        """Whether the process has records numbered above `after`, or no more will follow."""
        boot = self._boots.get(boot_id)
        return boot is None or boot.ended or (boot.last_seq > after and not self._must_wait(boot))

    def oldest(self) -> str:
        """The oldest process of which records are kept."""
        return next(iter(self._boots))

    def page(self, boot_id: str, after: int, now_unix_ms: int) -> bytes:
        """A `UsagePage` as JSON."""
        boot = self._boots.get(boot_id)
        lines: list[bytes] = []
        if boot is not None and not self._must_wait(boot):
            lines = boot.after(after, PAGE_RECORDS, PAGE_BYTES, folded_whole=boot_id in self._stale)
            if fences := boot.fence(after, len(lines)):
                self._note(boot, {"fences": fences})
        head = UsagePage(boot_id=boot_id, boots=self.states, records=[], now_unix_ms=now_unix_ms)
        head_json = head.model_dump_json(by_alias=True).encode()
        before, middle, behind = head_json.partition(b'"records":[')
        return b"".join((before, middle, b",".join(lines), behind))

    def _must_wait(self, boot: BootRecords) -> bool:
        return boot.boot_id in self._stale and self.stats.on_disk

    def acknowledge(self, boot_id: str, through: int) -> None:
        """Forgets the records of a process up to `through`, and its files when it has ended and none is left."""
        boot = self._boots.get(boot_id)
        if boot is None:
            return
        count, freed = -len(boot.lines), boot.acknowledge(through)
        self._measure(count + len(boot.lines), -freed)
        if boot is self._own or boot.lines:
            self._note(boot, {"acknowledged": boot.acknowledged})
        else:
            del self._boots[boot_id]
            self._stale.discard(boot_id)
            with contextlib.suppress(OSError):
                journal_file.remove(self._files.pop(boot_id))

    def _note(self, boot: BootRecords, note: dict[str, object]) -> None:
        """Writes what only the next process reads."""
        line = line_of(json.dumps(note).encode())
        if boot is not self._own:
            with contextlib.suppress(OSError), self._files[boot.boot_id].open("ab", buffering=0) as file:
                file.write(line)
        elif self._file is not None:
            self._write(line)

    # --- bounds -------------------------------------------------------------------------

    def _measure(self, records: int, size: int) -> None:
        self.stats.records += records
        self.stats.bytes += size

    @property
    def _is_full(self) -> bool:
        return self.stats.records > self._bounds.records or self.stats.bytes > self._bounds.bytes

    def _fit(self) -> None:
        while self._is_full:
            boot = next(
                (one for one in self._boots.values() if self._bounds.folds and one.folded < len(one.lines)), None
            )
            if boot is not None:
                records, size = len(boot.lines), boot.size
                self.stats.folded_requests += boot.fold(FOLD_RECORDS)
                if boot is not self._own or self._path is not None:
                    self._stale.add(boot.boot_id)
                self._measure(len(boot.lines) - records, boot.size - size)
                continue
            boot = next((one for one in self._boots.values() if one.lines), None)
            if boot is None:
                return
            count = max(1, len(boot.lines) // (10 if self._bounds.folds else 100))
            if self._bounds.folds:
                log.error("%d usage records are lost: the ledger has not collected them, and too many are kept", count)
                self.stats.dropped_records += count
            self._measure(-count, -boot.drop(count))

    # --- the disk -----------------------------------------------------------------------

    async def keep_on_disk(self) -> None:
        """Lets the disk take what was written, and writes the file again where much is not needed or it had failed.

        To be called every second or so.
        """
        if self._path is None or self._rewriting:
            return
        self._rewriting = True
        try:
            if self._file is not None:
                await asyncio.to_thread(self._file.sync)
            if self._wants_rewriting():
                self._file = await self._rewrite(self._own, self._path, self._file)
                if not self.stats.on_disk:
                    log.info("usage records are on the disk again")
                self.stats.on_disk = True
            for boot_id in self._stale - {self._own.boot_id}:
                if boot_id in self._stale:  # else it was acknowledged meanwhile
                    (await self._rewrite(self._boots[boot_id], self._files[boot_id], None)).close()
        except OSError as error:
            self._fail(error)
        finally:
            self._rewriting = False

    def _wants_rewriting(self) -> bool:
        if self._file is None:
            return not self.stats.on_disk and bool(self._own.last_seq)
        many = self._file.bytes > COMPACT_BYTES and self._file.bytes > 2 * self._own.size
        return many or self._own.boot_id in self._stale

    async def _rewrite(self, boot: BootRecords, path: Path, file: JournalFile | None) -> JournalFile:
        was_stale = boot.boot_id in self._stale
        self._stale.discard(boot.boot_id)  # what is folded from now on is not in the new file
        new, last = Rewriting(path), boot.last_seq
        try:
            await asyncio.to_thread(new.write, [_state_of(boot), *boot.lines])
            later = boot.lines[len(boot.lines) - sum(seq > last for seq in boot.seqs) :]
            return new.replace([_state_of(boot), *later], file)
        except OSError:
            if was_stale:
                self._stale.add(boot.boot_id)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _state_of(boot: BootRecords) -> bytes:
    return json.dumps({"acknowledged": boot.acknowledged, "fences": boot.fences}).encode()
