"""The weights of all adapter slots on the device: one stretch of memory, slot after slot, and where what lies in it.

A slot takes an adapter's bytes as they are (`layout`): one copy. While nobody can reference it, a slot is filled and
emptied by any thread (`fill`, `release`: no torch operator, so the engine's cores stay its own); the engine thread
alone makes it count, or not count, between two steps (`publish`, `withdraw`). On CPU the memory is an anonymous
mapping: pages that no adapter has touched cost nothing, emptying hands them back to the operating system, and how
much a slot really occupies is asked of the kernel, not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorapool_runtime.layout import Layout, first_linears, lay_out
from lorapool_runtime.memory import SlotMemory
from lorapool_runtime.packing import ALONE, Pace
from lorapool_runtime.targets import TargetGroup


class PackedWeights(Protocol):
    """An adapter in host memory: what `adapter_file` makes."""

    @property
    def layout(self) -> Layout: ...
    @property
    def buffer(self) -> np.ndarray: ...  # [layout.elements], bfloat16 as its 16-bit patterns


@dataclass(frozen=True, slots=True)
class GroupSlab:
    """What a kernel needs to know of one group: the same tensors for the whole life of the process, so that a captured
    graph may hold on to them. Slot s of member m has A [ranks[m, s], in] at memory[a_at[m, s]] and B
    [ranks[m, s], out_m] at memory[b_at[m, s]]; the A of all members follow each other without a gap. Rank 0: nothing
    to add."""

    number: int
    memory: Tensor  # [elements], all slots
    ranks: Tensor  # int32 [members, slots]
    a_at: Tensor  # int64 [members, slots], elements from the start of memory
    b_at: Tensor  # int64 [members, slots]
    in_features: int
    out_features: tuple[int, ...]
    max_rank: int


Span = tuple[Tensor, tuple[tuple[slice, slice, Tensor], ...]]


class Slabs:
    def __init__(
        self,
        groups: Sequence[TargetGroup],
        *,
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots, self.max_rank, self.dtype = slots, max_rank, dtype
        linears = sum(group.size for group in groups)
        whole = lay_out(tuple(groups), (max_rank,) * linears, dtype.itemsize)
        self._memory: SlotMemory | None = None
        if device.type == "cpu" and whole.elements:
            self._memory = SlotMemory(slots, whole.elements * dtype.itemsize)
            self.slot_bytes = self._memory.stride_bytes
            self.memory = torch.frombuffer(
                self._memory.mapping,
                dtype=dtype,
                count=slots * self.slot_bytes // dtype.itemsize,
                offset=self._memory.offset,
            )
        else:
            self.slot_bytes = whole.elements * dtype.itemsize
            self.memory = torch.zeros(slots * whole.elements, dtype=dtype, device=device)
        self._stride = self.slot_bytes // dtype.itemsize
        self._host_tables = torch.zeros(3, linears, slots, dtype=torch.int64)  # ranks, a_at, b_at
        self._ranks = torch.zeros(linears, slots, dtype=torch.int32, device=device)
        self._places = torch.zeros(2, linears, slots, dtype=torch.int64, device=device)
        self.layouts: list[Layout | None] = [None] * slots
        """What is published, by slot. Read by any thread, changed by the engine thread alone."""
        self._spans: dict[tuple[int, int, int], Span | None] = {}  # views are dear to make; gone when a slot changes
        self.firsts = first_linears(groups)
        self.groups = tuple(
            self._group(n, first, group) for n, (first, group) in enumerate(zip(self.firsts, groups, strict=True))
        )

    def _group(self, number: int, first: int, group: TargetGroup) -> GroupSlab:
        mine = slice(first, first + group.size)
        return GroupSlab(
            number=number,
            memory=self.memory,
            ranks=self._ranks[mine],
            a_at=self._places[0, mine],
            b_at=self._places[1, mine],
            in_features=group.in_features,
            out_features=group.out_features,
            max_rank=self.max_rank,
        )

    # --- any thread, while the slot is not published ---

    def fill(self, slot: int, weights: PackedWeights, pace: Pace = ALONE) -> None:
        """Copies the bytes of an adapter. On a GPU only the engine thread may call it."""
        self._refuse_published(slot)
        layout, buffer = weights.layout, weights.buffer
        if layout.elements > self._stride or layout.rank > self.max_rank:
            raise ValueError(f"an adapter of rank {layout.rank} does not fit slots of rank {self.max_rank}")
        if self._memory is not None:
            self._memory.fill(slot, buffer.view(np.uint8), pace)
            return
        values = torch.from_numpy(buffer)
        start = slot * self._stride
        self.memory[start : start + layout.elements].copy_(values.view(self.dtype), non_blocking=True)

    def release(self, slot: int) -> int:
        """Gives the slot's memory back to the operating system: the bytes that came free (none on a GPU)."""
        self._refuse_published(slot)
        return 0 if self._memory is None else self._memory.release(slot)

    def resident_bytes(self, slot: int) -> int:
        """What the slot occupies now, as the kernel counts it; on a GPU its reserved share."""
        return self.slot_bytes if self._memory is None else self._memory.resident_bytes(slot)

    # --- the engine thread, between two steps ---

    def publish(self, slot: int, layout: Layout) -> None:
        """From the next step on rows of this slot get what was filled in."""
        self._refuse_published(slot)
        self._host_tables[:, :, slot] = torch.from_numpy(layout.table)
        self._host_tables[1:, :, slot] += slot * self._stride
        self._ranks[:, slot] = self._host_tables[0, :, slot].to(self._ranks)
        self._places[:, :, slot] = self._host_tables[1:, :, slot].to(self._places)
        self.layouts[slot] = layout
        self._spans.clear()

    def withdraw(self, slot: int) -> None:
        """From the next step on the slot adds nothing to any row."""
        self.layouts[slot] = None
        self._spans.clear()
        self._host_tables[0, :, slot] = 0
        self._ranks[:, slot] = 0

    def occupied(self, slot: int) -> bool:
        return self.layouts[slot] is not None

    # --- views, for plain products ---

    def span(self, group: int, first: int, slots: int) -> Span | None:
        """Slots first..first+slots-1, which must share a layout (unused ones between may hold anything): A
        [slots, ranks of all members, in], and per member with a rank its columns of y, its part of the ranks, its B
        [slots, rank, out]. None where the adapter has nothing for the group."""
        key = (group, first, slots)
        if key not in self._spans:
            self._spans[key] = self._span(self.groups[group], first, slots)
        return self._spans[key]

    def _span(self, group: GroupSlab, first: int, slots: int) -> Span | None:
        layout = self.layouts[first]
        if layout is None:
            return None
        start = self.firsts[group.number]
        pieces = layout.pieces[start : start + len(group.out_features)]
        ranks = list(accumulate((piece.rank for piece in pieces), initial=0))
        columns = list(accumulate(group.out_features, initial=0))
        if ranks[-1] == 0:
            return None
        parts = tuple(
            (
                slice(columns[member], columns[member + 1]),
                slice(ranks[member], ranks[member + 1]),
                self._view(first, slots, piece.rank, piece.out_features, piece.b_at),
            )
            for member, piece in enumerate(pieces)
            if piece.rank
        )
        return self._view(first, slots, ranks[-1], group.in_features, pieces[0].a_at), parts

    def _view(self, first: int, slots: int, rows: int, width: int, at: int) -> Tensor:
        return self.memory.as_strided((slots, rows, width), (self._stride, width, 1), first * self._stride + at)

    def _refuse_published(self, slot: int) -> None:
        if self.layouts[slot] is not None:
            raise ValueError(f"slot {slot} is not empty")
