"""The row kernel of a GPU: the Triton kernels of `triton_lora` behind the protocol `layer.StepKernel`.

Its tables are made once, so that a launch reads nothing from the host and a CUDA graph can capture it. A step with
many rows of one slot (a prefill) is computed in tiles of rows. The host chooses the tiles before the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.kernels.triton_lora import (
    ALIGNED,
    SEGMENT_ROWS,
    lora_rows,
    lora_segments,
    output_tiles,
)
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows, slot_of_each_row
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots, GroupTables
from lorapool_runtime.engines.torch.transfers import to_device

_FEW_ROWS = 8
"""Rows of one slot up to which one program per row is faster than a tile."""


class TritonKernel:
    """`layer.StepKernel` by Triton. Raises ValueError for adapters that are not float32, float16 or bfloat16."""

    def __init__(self, slots: AdapterSlots) -> None:
        if slots.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"no kernel for adapters of type {slots.dtype}")
        self._device, self._slots = slots.memory.device, slots.count
        self._tiles = [torch.tensor(output_tiles(g.out_features), device=self._device) for g in slots.groups]
        self._align = [
            ALIGNED if all(width % ALIGNED == 0 for width in (g.in_features, *g.out_features)) else 1
            for g in slots.groups
        ]

    def add(self, y: Tensor, x: Tensor, row_slots: Tensor, group: GroupTables) -> None:
        """See `layer.RowKernel.add`."""
        tiles, align = self._tiles[group.number], self._align[group.number]
        lora_rows(x, row_slots, group.memory, group.ranks, group.a_at, group.b_at, tiles, group.max_rank, align, y)

    def warm_up(self, slots: AdapterSlots) -> None:
        """Compiles every kernel that a step may launch, with a row of the base, for which they access no memory."""
        nothing = np.full(1, BASE_SLOT, np.int32)
        row_slots, (order, segments) = self._moved(nothing), map(self._moved, row_tiles(nothing, self._slots))
        for group in slots.by_kernel:
            x = torch.zeros(1, group.in_features, dtype=slots.dtype, device=self._device)
            y = torch.zeros(1, sum(group.out_features), dtype=slots.dtype, device=self._device)
            self.add(y, x, row_slots, group)
            self._add_segments(y, x, order, segments, group)

    def prepare(self, batch: Sequence[SlotRows]) -> Callable[[Tensor, Tensor, GroupTables], None]:
        """See `layer.StepKernel.prepare`."""
        row_slots = np.array(slot_of_each_row(batch), np.int32)
        if max(np.unique(row_slots[row_slots != BASE_SLOT], return_counts=True)[1], default=0) <= _FEW_ROWS:
            on_device = self._moved(row_slots)
            return lambda y, x, group: self.add(y, x, on_device, group)
        order, segments = (self._moved(table) for table in row_tiles(row_slots, self._slots))
        return lambda y, x, group: self._add_segments(y, x, order, segments, group)

    def _add_segments(self, y: Tensor, x: Tensor, order: Tensor, segments: Tensor, group: GroupTables) -> None:
        tiles, align = self._tiles[group.number], self._align[group.number]
        lora_segments(
            x, order, segments, group.memory, group.ranks, group.a_at, group.b_at, tiles, group.max_rank, align, y
        )

    def _moved(self, table: np.ndarray) -> Tensor:
        return to_device(table, torch.int32, self._device)


def row_tiles(row_slots: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The arguments order and segments of `lora_segments`. row_slots: int32 [rows], in any order.

    Returns int32 [rows] and int32 [the most tiles that this number of rows and slots can need, SEGMENT_FIELDS].
    """
    rows = len(row_slots)
    order = np.argsort(row_slots, kind="stable").astype(np.int32)
    order = order[np.searchsorted(row_slots[order], BASE_SLOT, side="right") :]  # the base's rows are first
    present, begins, counts = np.unique(row_slots[order], return_index=True, return_counts=True)
    segments = np.full((rows // SEGMENT_ROWS + min(slots, rows), 3), (BASE_SLOT, 0, 0), np.int32)
    tiles = [
        (slot, begin + first, min(SEGMENT_ROWS, count - first))
        for slot, begin, count in zip(present, begins, counts, strict=True)
        for first in range(0, count, SEGMENT_ROWS)
    ]
    segments[: len(tiles)] = np.array(tiles, np.int32).reshape(-1, 3)
    return np.concatenate([order, np.zeros(rows - len(order), np.int32)]), segments
