"""Which rows of a step belong to which adapter slot. Pure.

Rows of the base get no LoRA, so none of these functions returns them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorapool_runtime.engines.interface import BASE_SLOT


@dataclass(frozen=True, slots=True)
class SlotRows:
    """Rows [begin, end) of the batch, which run on `slot`."""

    slot: int
    begin: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.begin


def adapter_segments(batch: Iterable[SlotRows]) -> tuple[SlotRows, ...]:
    """The rows that get LoRA, in the batch's order; adjacent rows of the same slot are merged."""
    merged: list[SlotRows] = []
    for rows in batch:
        if merged and merged[-1].slot == rows.slot and merged[-1].end == rows.begin:
            merged[-1] = SlotRows(rows.slot, merged[-1].begin, rows.end)
        elif rows.slot != BASE_SLOT:
            merged.append(rows)
    return tuple(merged)


def slot_of_each_row(batch: Sequence[SlotRows]) -> list[int]:
    """The slot of every row, BASE_SLOT for rows of the base. `batch` covers the rows from 0 on without a gap."""
    return [rows.slot for rows in batch for _ in range(rows.count)]
