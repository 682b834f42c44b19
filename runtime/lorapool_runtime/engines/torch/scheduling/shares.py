"""Which adapter has more than its share of the batch: the rows and KV blocks of its running sequences are counted.

All adapters that have sequences, running or waiting, have equal shares; the base counts as one. What one does not use,
others may use until it is wanted. A sequence is preempted for another adapter only if one of its own adapter still
runs, so that none is preempted without end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from lorapool_runtime.engines.torch.scheduling.sequence import Sequence


class Shares:
    """What each slot has of the batch while `running` are in it. `slots` have sequences, running or waiting."""

    def __init__(self, running: Iterable[Sequence], slots: set[int], *, rows: int, blocks: int) -> None:
        self._row_share = max(1, rows // len(slots))
        self._block_share = max(1, blocks // len(slots))
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

    def most_above(self) -> int | None:
        """The slot that has the most above its share; None when none is above, or has only one sequence."""
        excess = {slot: self._excess(slot) for slot, rows in self._rows.items() if rows > 1}
        slot = max(excess, key=lambda slot: excess[slot], default=None)
        return None if slot is None or excess[slot] <= 1 else slot

    def _excess(self, slot: int) -> float:
        return max(self._rows[slot] / self._row_share, self._blocks[slot] / self._block_share)
