"""The records of one process that the ledger has not acknowledged, as the JSON that is sent and written."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from lorapool_api.usage_protocol import BootState, RequestRecord
from lorapool_runtime.accounts.folding import RECORD, fold

MAX_FENCES = 64
"""Ends of pages that were sent and not acknowledged. A reader that commits only some of them asks on from one."""


@dataclass(slots=True)
class BootRecords:
    boot_id: str
    seqs: list[int] = field(default_factory=list)
    """Numbers of `lines`, in order."""
    lines: list[bytes] = field(default_factory=list)
    size: int = 0
    """Bytes of `lines`."""
    last_seq: int = 0
    """Newest record, acknowledged or not."""
    acknowledged: int = 0
    ended: bool = False
    fences: list[int] = field(default_factory=list)
    """Up to where a reader may have committed."""
    folded: int = 0
    """How many of the oldest records are folded already."""
    _fold_all_at: int = 4000
    """Folded records from which on they are folded once more, since many folds fit into fewer."""

    def add(self, seq: int, line: bytes) -> None:
        """Adds a record in the order of the numbers; does nothing for a number that is there already."""
        at = bisect_right(self.seqs, seq)
        if at and self.seqs[at - 1] == seq:
            return
        self.seqs.insert(at, seq)
        self.lines.insert(at, line)
        self.size += len(line)
        self.last_seq = max(self.last_seq, seq)

    def state(self) -> BootState:
        return BootState(
            boot_id=self.boot_id,
            first_seq=self.seqs[0] if self.seqs else self.last_seq + 1,
            last_seq=self.last_seq,
            ended=self.ended,
        )

    def after(self, seq: int, most: int, most_bytes: int, *, folded_whole: bool = False) -> list[bytes]:
        """The first records numbered above `seq`: at most so many of so many bytes, but one.

        `folded_whole`: with all records that are folded, however many these are.
        """
        first = bisect_right(self.seqs, seq)
        at_least = max(1, self.folded - first) if folded_whole else 1
        found = self.lines[first : first + max(most, at_least)]
        size = 0
        for number, line in enumerate(found):
            size += len(line)
            if size > most_bytes and number >= at_least:
                return found[:number]
        return found

    def fence(self, after: int, count: int) -> list[int]:
        """Notes that a reader that has committed `after` is sent so many records; returns the fences that are new."""
        first = bisect_right(self.seqs, after)
        ends = self.seqs[first : first + count][-1:]
        self.fences = [one for one in self.fences if one >= after]
        new = [one for one in (*([after] if after else []), *ends) if one not in self.fences]
        for one in new:
            insort(self.fences, one)
        del self.fences[:-MAX_FENCES]
        return new

    def acknowledge(self, through: int) -> int:
        """Forgets the records up to `through`; returns their bytes."""
        count = bisect_right(self.seqs, through)
        self.acknowledged = max(self.acknowledged, min(through, self.last_seq))
        self.fences = [one for one in self.fences if one > through]
        return self.drop(count)

    def drop(self, count: int) -> int:
        freed = sum(map(len, self.lines[:count]))
        del self.seqs[:count], self.lines[:count]
        self.size -= freed
        self.folded = max(0, self.folded - count)
        return freed

    def fold(self, count: int) -> int:
        """Folds the `count` oldest records that are not folded yet; returns how many requests became remainders."""
        begin, end = self.folded, min(self.folded + count, len(self.lines))
        requests = self._fold(begin, end)
        if self.folded >= self._fold_all_at:
            self._fold(0, self.folded)
            self._fold_all_at = max(self._fold_all_at, 2 * self.folded)
        return requests

    def _fold(self, begin: int, end: int) -> int:
        before = [RECORD.validate_json(line) for line in self.lines[begin:end]]
        after = fold(before, self.fences)
        lines = [record.model_dump_json(by_alias=True).encode() for record in after]
        self.size += sum(map(len, lines)) - sum(map(len, self.lines[begin:end]))
        self.seqs[begin:end] = [record.seq for record in after]
        self.lines[begin:end] = lines
        self.folded = begin + len(after)
        return _requests(before) - _requests(after)


def _requests(records: Iterable[object]) -> int:
    return sum(isinstance(record, RequestRecord) for record in records)
