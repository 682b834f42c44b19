"""The adapter slots: the one owner of what each slot holds, where, and whether requests can reach it.

Any thread may fill and release a slot that is not published, one at a time. The engine thread alone publishes and
withdraws, between two steps. See `slot_state` for the moves.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lorapool_api.base_modules import ModuleKind
from lorapool_runtime.engines.torch.lora.slot_memory import (
    DeviceMemory,
    HostMemory,
    PackedWeights,
    SlotMemory,
    weights_bytes,
)
from lorapool_runtime.engines.torch.lora.slot_state import SlotContents, SlotState, SlotStatus
from lorapool_runtime.engines.torch.transfers import to_device
from lorapool_runtime.weights.layout import Layout, first_linears, lay_out
from lorapool_runtime.weights.targets import TargetGroup

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GroupTables:
    """The tables by which a kernel finds the matrices of one group; the same tensors for the life of the process.

    Slot s of member m has A [ranks[m, s], in] at a_at[m, s] and B [ranks[m, s], out_m] at b_at[m, s], counted in
    elements from the start of `memory`; on a CPU these positions are outside of it. The A matrices of all members are
    contiguous. Rank 0 adds nothing.
    """

    number: int
    memory: Tensor
    ranks: Tensor  # int32 [members, slots]
    a_at: Tensor  # int64 [members, slots], elements from the start of memory
    b_at: Tensor  # int64 [members, slots]
    in_features: int
    out_features: tuple[int, ...]
    max_rank: int


@dataclass(frozen=True, slots=True)
class GroupMatrices:
    """Views of one slot's matrices for one group."""

    a: Tensor  # [ranks of all members, in]
    members: tuple[tuple[slice, slice, Tensor], ...]
    """Of each member with a rank: its columns of y, its part of the ranks, its B [rank, out]."""


class AdapterSlots:
    def __init__(
        self,
        groups: Sequence[TargetGroup],
        *,
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device,
        in_host_memory: bool,
    ) -> None:
        """in_host_memory: a slot is its adapter's own buffer instead of a copy. Possible on a CPU only."""
        self.count, self.max_rank, self.dtype = slots, max_rank, dtype
        linears = sum(group.size for group in groups)
        usual = tuple(max_rank if group.kind is ModuleKind.LINEAR else 0 for group in groups for _ in group.modules)
        self._elements = lay_out(tuple(groups), usual, dtype.itemsize).elements
        self._storage: SlotMemory = (
            HostMemory(dtype) if in_host_memory else DeviceMemory(slots, self._elements, dtype, device)
        )
        self.memory = self._storage.memory
        self._states = tuple(SlotState(number) for number in range(slots))
        self._host_tables = torch.zeros(3, linears, slots, dtype=torch.int64)  # ranks, a_at, b_at
        self._ranks = torch.zeros(linears, slots, dtype=torch.int32, device=device)
        self._positions = torch.zeros(2, linears, slots, dtype=torch.int64, device=device)
        self._matrices: dict[tuple[int, int], GroupMatrices | None] = {}  # by group and slot: views are slow to make
        self._by_torch: set[int] = set()
        self._targets = tuple(groups)
        self.first_linears = first_linears(groups)
        self.groups = tuple(
            self._tables(number, first, group)
            for number, (first, group) in enumerate(zip(self.first_linears, groups, strict=True))
        )

    def _tables(self, number: int, first: int, group: TargetGroup) -> GroupTables:
        linears = slice(first, first + group.size)
        return GroupTables(
            number=number,
            memory=self.memory,
            ranks=self._ranks[linears],
            a_at=self._positions[0, linears],
            b_at=self._positions[1, linears],
            in_features=group.in_features,
            out_features=group.out_features,
            max_rank=self.max_rank,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together when each holds an adapter of the highest rank in all usual modules."""
        return self.count * self._elements * self.dtype.itemsize

    @property
    def by_kernel(self) -> tuple[GroupTables, ...]:
        """The groups that a kernel computes."""
        return tuple(tables for tables, group in zip(self.groups, self._targets, strict=True) if group.by_kernel)

    # --- any thread, while the slot is not published ---

    def fill(self, slot: int, weights: PackedWeights) -> int:
        """Stores an adapter in the slot and returns the bytes it occupies there.

        Raises ValueError for an adapter that does not fit, IllegalSlotMoveError for a published slot.
        """
        state, layout = self._states[slot], weights.layout
        state.require_unpublished()
        if layout.rank > self.max_rank:
            raise ValueError(f"an adapter of rank {layout.rank} does not fit slots of rank {self.max_rank}")
        state.fill(SlotContents(layout, self._storage.place(slot, weights)))
        return state.resident_bytes

    def release(self, slot: int) -> int:
        """Empties the slot and returns the bytes given back to the system.

        0 on a GPU, whose regions are reserved, and where another owner still holds the adapter. Raises
        IllegalSlotMoveError for a published slot.
        """
        weights = self._states[slot].release()
        if weights is None:
            return 0
        size, still_held = weights_bytes(weights), weakref.ref(weights)
        del weights
        return size if still_held() is None else 0

    # --- the engine thread, between two steps ---

    def publish(self, slot: int) -> None:
        """Makes the filled slot visible from the next step on. Raises IllegalSlotMoveError unless it is filled."""
        state = self._states[slot]
        state.publish()
        self._host_tables[:, :, slot] = torch.from_numpy(state.contents.layout.table)
        self._host_tables[1:, :, slot] += state.contents.placement.first_element
        ranks, positions = self._host_tables[0, :, slot], self._host_tables[1:, :, slot]
        self._ranks[:, slot] = to_device(ranks.numpy(), torch.int32, self._ranks.device)
        self._positions[:, :, slot] = to_device(positions.numpy(), torch.int64, self._positions.device)
        if self._changes_by_torch(state.contents.layout):
            self._by_torch.add(slot)
            log.info("an adapter changes an embedding or experts: its decode steps run the model's own code")
        self._forget_views(slot)

    def withdraw(self, slot: int) -> None:
        """Hides the slot from the next step on: it adds nothing to any row. Harmless where it is not published."""
        self._states[slot].withdraw()
        self._by_torch.discard(slot)
        self._forget_views(slot)
        self._host_tables[0, :, slot] = 0
        self._ranks[:, slot] = 0

    def claim(self, slot: int, salt: str) -> None:
        """Binds the slot's weights to the identity of a request. Raises WrongWeightsError, see `SlotState.claim`."""
        self._states[slot].claim(salt)

    def runs_by_torch(self, slot: int) -> bool:
        """Whether the published adapter changes an embedding or experts, which no kernel and no graph computes."""
        return slot in self._by_torch

    @property
    def any_by_torch(self) -> bool:
        return bool(self._by_torch)

    def is_published(self, slot: int) -> bool:
        return self._states[slot].status is SlotStatus.PUBLISHED

    @property
    def published_bytes(self) -> int:
        """Bytes that all published adapters occupy."""
        return sum(state.resident_bytes for state in self._states if state.status is SlotStatus.PUBLISHED)

    # --- views, for products by torch ---

    def matrices(self, group: int, slot: int) -> GroupMatrices | None:
        """None where the slot is not published or its adapter targets no member of the group."""
        key = (group, slot)
        if key not in self._matrices:
            published = self.is_published(slot)
            self._matrices[key] = self._views(self.groups[group], self._states[slot].contents) if published else None
        return self._matrices[key]

    def member_matrices(self, group: int, member: int, slot: int) -> tuple[Tensor, Tensor] | None:
        """A and B of one member, [rows of the member, in] and [rows, out]; None where the adapter has none."""
        if not self.is_published(slot):
            return None
        contents = self._states[slot].contents
        linear = contents.layout.linears[self.first_linears[group] + member]
        if not linear.rank:
            return None
        buffer = contents.placement.buffer
        return (
            _matrix(buffer, linear.a_at, linear.rank, linear.in_features),
            _matrix(buffer, linear.b_at, linear.rank, linear.out_features),
        )

    def _changes_by_torch(self, layout: Layout) -> bool:
        return any(
            linear.rank
            for first, group in zip(self.first_linears, self._targets, strict=True)
            if not group.by_kernel
            for linear in layout.linears[first : first + group.size]
        )

    def _views(self, group: GroupTables, contents: SlotContents) -> GroupMatrices | None:
        layout, buffer = contents.layout, contents.placement.buffer
        first = self.first_linears[group.number]
        linears = layout.linears[first : first + len(group.out_features)]
        ranks = list(accumulate((linear.rank for linear in linears), initial=0))
        columns = list(accumulate(group.out_features, initial=0))
        if ranks[-1] == 0:
            return None
        members = tuple(
            (
                slice(columns[member], columns[member + 1]),
                slice(ranks[member], ranks[member + 1]),
                _matrix(buffer, linear.b_at, linear.rank, linear.out_features),
            )
            for member, linear in enumerate(linears)
            if linear.rank
        )
        return GroupMatrices(_matrix(buffer, linears[0].a_at, ranks[-1], group.in_features), members)

    def _forget_views(self, slot: int) -> None:
        for group in range(len(self.groups)):
            self._matrices.pop((group, slot), None)


def _matrix(buffer: Tensor, at: int, rows: int, width: int) -> Tensor:
    """A view [rows, width] of the buffer's elements from `at` on."""
    return buffer[at : at + rows * width].view(rows, width)
