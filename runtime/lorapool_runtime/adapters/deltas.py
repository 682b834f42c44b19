"""Which reports changed since a reader's last snapshot, so that a snapshot need not repeat thousands of others.

Every change is stamped with the number that the next snapshot after the change has: the snapshot with the present
number may have been sent already. Removals are remembered up to a bound; a reader who missed one needs all reports.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Reversible
from dataclasses import dataclass

from lorapool_api.common import AdapterKey
from lorapool_runtime.events import Changes

REMOVALS = 4096


@dataclass(frozen=True, slots=True)
class Delta:
    changed: tuple[AdapterKey, ...]
    """Registered adapters, oldest change first."""
    removed: tuple[AdapterKey, ...]
    """Adapters that are, or were in between, not registered; to be applied before `changed`."""


class ReportChanges:
    def __init__(self, changes: Changes, *, removals: int = REMOVALS) -> None:
        self._changes = changes
        self._changed: OrderedDict[AdapterKey, int] = OrderedDict()
        self._removed: deque[tuple[AdapterKey, int]] = deque()
        self._removals = removals
        self._forgotten = 0
        """Stamp of the latest removal that is not remembered any more."""

    def mark(self, key: AdapterKey) -> None:
        """Records that a report changed or was added."""
        self._changed[key] = self._stamp()
        self._changed.move_to_end(key)

    def remove(self, key: AdapterKey) -> None:
        """Records that the adapter is not registered any more."""
        self._changed.pop(key, None)
        self._removed.append((key, self._stamp()))
        if len(self._removed) > self._removals:
            _, self._forgotten = self._removed.popleft()

    def since(self, seq: int) -> Delta | None:
        """What a reader of the snapshot numbered `seq` has missed. None: too much is forgotten, send everything."""
        if seq < self._forgotten or seq > self._changes.seq:
            return None
        return Delta(tuple(_after(self._changed.items(), seq))[::-1], tuple(_after(self._removed, seq))[::-1])

    def _stamp(self) -> int:
        return self._changes.seq + 1


def _after(stamped: Reversible[tuple[AdapterKey, int]], seq: int) -> Iterator[AdapterKey]:
    """The keys with a later stamp, latest first. Stamps never fall, so the search ends at the first older one."""
    for key, stamp in reversed(stamped):
        if stamp <= seq:
            return
        yield key
