"""Which adapter has more than its share of the batch: the rows and KV blocks of its running sequences are counted.

All adapters that have sequences, running or waiting, have equal shares; the base counts as one. What one does not use,
others may use until it is wanted. A sequence is preempted for another adapter only if one of its own adapter still
runs, so that none is preempted without end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as ListOf

from lorapool_runtime.engines.torch.scheduling.sequence import Sequence


class Shares:
    def __init__(self, slots: set[int], *, rows: int, blocks: int) -> None:
        """`slots` have sequences; `rows` and `blocks` are shared."""
        self._rows = max(1, rows // max(1, len(slots)))
        self._blocks = max(1, blocks // max(1, len(slots)))

    def entitled(self, slot: int, running: ListOf[Sequence], more_blocks: int = 0) -> bool:
        """Whether the slot has less than its share, also with `more_blocks`."""
        own = [sequence for sequence in running if sequence.slot == slot]
        return len(own) < self._rows and _blocks(own) + more_blocks <= self._blocks

    def victim(self, running: ListOf[Sequence]) -> Sequence | None:
        """The youngest sequence of the slot that has the most above its share; None when none is above."""
        rows, blocks = Counter(sequence.slot for sequence in running), Counter[int]()
        for sequence in running:
            blocks[sequence.slot] += len(sequence.block_table)
        excess = {
            slot: max(count / self._rows, blocks[slot] / self._blocks) for slot, count in rows.items() if count > 1
        }
        slot = max(excess, key=lambda slot: excess[slot], default=None)
        if slot is None or excess[slot] <= 1:
            return None
        return max((s for s in running if s.slot == slot), key=lambda s: s.arrival)


def _blocks(sequences: ListOf[Sequence]) -> int:
    return sum(len(sequence.block_table) for sequence in sequences)
