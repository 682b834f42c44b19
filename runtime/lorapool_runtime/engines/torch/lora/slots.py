"""The adapter slots: which adapter is in which, and where each of its matrices lies.

While nobody can reference it, a slot is filled and emptied by any thread (`fill`, `release`: no torch operator, so the
engine's cores stay its own); the engine thread alone makes it count, or not count, between two steps (`publish`,
`withdraw`). The memory itself is `slot_store`'s. How much a slot really occupies is asked of the system, not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorapool_runtime.engines.torch.lora.slot_memory import CopyingStore, PackedWeights, SharingStore, SlotStore
from lorapool_runtime.weights.layout import Layout, first_linears, lay_out
from lorapool_runtime.weights.pack import ALONE, Pace
from lorapool_runtime.weights.targets import TargetGroup


@dataclass(frozen=True, slots=True)
class GroupSlab:
    """What a kernel needs to know of one group: the same tensors for the whole life of the process, so that a captured
    graph may hold on to them. Slot s of member m has A [ranks[m, s], in] at the place a_at[m, s] and B
    [ranks[m, s], out_m] at b_at[m, s], counted in elements from the start of `memory` and, where adapters share their
    memory with the slots, outside of it; the A of all members follow each other without a gap. Rank 0: nothing to add.
    """

    number: int
    memory: Tensor
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
        sharing: bool = False,
    ) -> None:
        """sharing: on CPU, a slot is its adapter's own memory; then no product spans neighbouring slots."""
        self.slots, self.max_rank, self.dtype = slots, max_rank, dtype
        linears = sum(group.size for group in groups)
        self._elements = lay_out(tuple(groups), (max_rank,) * linears, dtype.itemsize).elements
        self._store: SlotStore = (
            SharingStore(slots, dtype) if sharing else CopyingStore(slots, self._elements, dtype, device)
        )
        self.memory = self._store.memory
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
        """On a GPU only the engine thread may call it."""
        self._refuse_published(slot)
        layout = weights.layout
        if layout.elements > self._elements or layout.rank > self.max_rank:
            raise ValueError(f"an adapter of rank {layout.rank} does not fit slots of rank {self.max_rank}")
        self._store.fill(slot, weights, pace)

    def release(self, slot: int) -> int:
        """Gives the slot's memory back: the bytes that came free, none where somebody else holds the adapter."""
        self._refuse_published(slot)
        return self._store.release(slot)

    def resident_bytes(self, slot: int) -> int:
        """What the slot occupies now; on a GPU its reserved share."""
        return self._store.resident_bytes(slot)

    # --- the engine thread, between two steps ---

    def publish(self, slot: int, layout: Layout) -> None:
        """From the next step on rows of this slot get what was filled in."""
        self._refuse_published(slot)
        self._host_tables[:, :, slot] = torch.from_numpy(layout.table)
        self._host_tables[1:, :, slot] += self._store.begin(slot)
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
                self._store.view(first, slots, piece.rank, piece.out_features, piece.b_at),
            )
            for member, piece in enumerate(pieces)
            if piece.rank
        )
        return self._store.view(first, slots, ranks[-1], group.in_features, pieces[0].a_at), parts

    def _refuse_published(self, slot: int) -> None:
        if self.layouts[slot] is not None:
            raise ValueError(f"slot {slot} is not empty")
