"""Which adapter has more than its share of the batch: the rows and KV blocks of its running sequences are counted.

All adapters that have sequences, running or waiting, have equal shares; the base counts as one. What one does not use,
others may use until it is wanted. A sequence is preempted for another adapter only if one of its own adapter still
runs, so that none is preempted without end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lorapool_runtime.engines.torch.scheduling.sequence import Sequence

WANTED_STEPS = 32
"""A share counts as wanted for so many steps, since a client's next request follows soon after its last answer."""


class Shares:
    """What each slot has of the batch while `running` are in it. `slots` have sequences, running or waiting."""

    def __init__(self, running: Iterable[Sequence], slots: set[int], *, rows: int, blocks: int) -> None:
        self._row_share = max(1, rows // max(1, len(slots)))
        self._block_share = max(1, blocks // max(1, len(slots)))
        self._rows, self._blocks = Counter[int](), Counter[int]()
        for sequence in running:
            self.add(sequence)

    def add(self, sequence: Sequence) -> None:
        self._rows[sequence.slot] += 1
        self._blocks[sequence.slot] += len(sequence.block_table)

    def remove(self, sequence: Sequence) -> None:
        self._rows[sequence.slot] -= 1
        self._blocks[sequence.slot] -= len(sequence.block_table)

    def entitled(self, slot: int, more_blocks: int = 0) -> bool:
        """Whether the slot has less than its share, also with `more_blocks`."""
        return self._rows[slot] < self._row_share and self._blocks[slot] + more_blocks <= self._block_share

    def entitled_rows(self, wanted: int) -> int:
        """How many of the rows that a slot wants are within its share."""
        return min(self._row_share, wanted)

    def unused_rows(self, slot: int, wanted: int) -> int:
        """How many of the rows that a slot wants within its share it does not have."""
        return max(0, self.entitled_rows(wanted) - self._rows[slot])

    def most_above(self) -> int | None:
        """The slot that has the most above its share; None when none is above, or has only one sequence."""
        excess = {slot: self._excess(slot) for slot, rows in self._rows.items() if rows > 1}
        slot = max(excess, key=lambda slot: excess[slot], default=None)
        return None if slot is None or excess[slot] <= 1 else slot

    def _excess(self, slot: int) -> float:
        return max(self._rows[slot] / self._row_share, self._blocks[slot] / self._block_share)


class WantedRows:
    """How many rows each slot wanted within its share in the last `WANTED_STEPS` steps, at most."""

    def __init__(self) -> None:
        self._step = 0
        self._most: dict[int, tuple[int, int]] = {}
        """Slot -> rows, and the last step in which it wanted so many."""

    def observe(self, running: Iterable[Sequence], waiting: Iterable[Sequence], shares: Shares) -> int:
        """Counts one step. Returns the rows of all slots."""
        self._step += 1
        wanted = Counter(sequence.slot for sequence in (*running, *waiting))
        oldest = self._step - WANTED_STEPS
        self._most = {slot: kept for slot, kept in self._most.items() if kept[1] > oldest}
        for slot, count in wanted.items():
            rows = shares.entitled_rows(count)
            if rows >= self._most.get(slot, (0, 0))[0]:
                self._most[slot] = (rows, self._step)
        return sum(shares.entitled_rows(rows) for rows, _ in self._most.values())

    def unused(self, shares: Shares) -> int:
        """Returns how many of these rows are not in use."""
        return sum(shares.unused_rows(slot, rows) for slot, (rows, _) in self._most.items())
