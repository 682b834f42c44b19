"""The LoRA layer: many adapters in one batch, on top of the base's own linear layers.

    y = x W^T + b  +  (x A_s^T) B_s        x: [rows, in]   A_s: [rank, in]   B_s: [rank, out], alpha/r folded in
                                           s: the row's slot, -1 for the base: nothing is added, nothing is multiplied

A step is a short list of ways, chosen once per step (`ways`) and used by every layer: a row kernel (`RowKernel`: any
order, any ranks), a segment (one slot, plain products), a slab run (neighbouring slots of one layout, one batched
product with the slab itself as operand), or the same over scattered rows. Rows meet only their own slot's weights:
what is not finite in one row stays there. `model` puts these modules in place; the engine thread alone runs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.kernels.fused_linear import FusedLinear
from lorapool_runtime.engines.torch.lora.dispatch import KernelRows, Rows, ScatteredRun, Segment, SlabRun, choose_ways
from lorapool_runtime.engines.torch.lora.slots import GroupSlab, Slabs
from lorapool_runtime.engines.torch.lora.way_costs import USUAL, WayCosts
from lorapool_runtime.weights.targets import TargetGroup


class RowKernel(Protocol):
    """One kernel for rows in any order and of any mix of slots and ranks; the native one on CPU, Triton's on a GPU."""

    def add(self, y: Tensor, x: Tensor, row_slots: Tensor, group: GroupSlab) -> None:
        """y[i] += B_s A_s x[i] for s = row_slots[i]; rows of slot -1 and of rank 0 are left bit for bit as they are.

        y: [rows, out of all members] and x: [rows, in], contiguous; row_slots: int32 [rows] on x's device.
        On a GPU it must not look at any value on the host, so that a CUDA graph can capture it.
        """
        ...


@runtime_checkable
class StepKernel(RowKernel, Protocol):
    """A row kernel that takes long runs of one slot too, and so adds all of a step's LoRA by itself: Triton's."""

    def prepare(self, pieces: Sequence[Rows]) -> Callable[[Tensor, Tensor, GroupSlab], None]:
        """The next step's `add`, without the row's slots: called with y, x and the group as there."""
        ...


class LoraBatch:
    """What the layers read during a step. One per engine, handed to every group."""

    def __init__(self) -> None:
        self.slabs: Slabs | None = None
        self.groups: list[LoraGroup] = []
        self.kernel: RowKernel | None = None
        self.costs: WayCosts = USUAL
        self._row_slots: Tensor | None = None  # int32 [rows]: what the kernel adds
        self._prepared: Callable[[Tensor, Tensor, GroupSlab], None] | None = None  # or all that a step kernel adds
        self._runs: tuple[PlainRun, ...] = ()  # what plain products add

    def set(self, pieces: Sequence[Rows]) -> None:
        """The next step's rows, in the batch's order."""
        self._row_slots, self._prepared, self._runs = None, None, ()
        slabs = self.slabs
        if slabs is None or all(piece.slot == BASE_SLOT for piece in pieces):
            return
        if isinstance(self.kernel, StepKernel):
            self._prepared = self.kernel.prepare(pieces)
            return
        ways = choose_ways(pieces, slabs.layouts, self.costs, kernel=self.kernel is not None)
        if ways and isinstance(ways[0], KernelRows):
            self._row_slots = torch.tensor(ways[0].row_slots, dtype=torch.int32, device=slabs.memory.device)
        self._runs = tuple(PlainRun(way, slabs) for way in ways if not isinstance(way, KernelRows))

    def use(self, row_slots: Tensor) -> None:
        """Every row goes through the kernel, by a tensor that the caller keeps and overwrites: for a captured graph.
        row_slots: int32 [rows]."""
        self._row_slots, self._prepared, self._runs = row_slots, None, ()

    def add(self, group: int, x: Tensor, y: Tensor) -> None:
        """x: [rows, in]; y: [rows, out of all members], added to in place."""
        if self._row_slots is not None:
            assert self.kernel is not None
            assert self.slabs is not None
            self.kernel.add(y, x, self._row_slots, self.slabs.groups[group])
        if self._prepared is not None:
            assert self.slabs is not None
            self._prepared(y, x, self.slabs.groups[group])
        for run in self._runs:
            run.add(group, x, y)


class PlainRun:
    """Plain torch products for some rows of a step, in float32 and rounded once to the base's type: what peft computes.
    Rounding u to bfloat16 as well makes the log-probabilities differ from peft's several times as much."""

    def __init__(self, way: Segment | SlabRun | ScatteredRun, slabs: Slabs) -> None:
        self._slabs = slabs
        self._source = self._place = None
        if isinstance(way, Segment):
            self._first, self._slots, self._each, self._begin = way.rows.slot, 1, way.rows.count, way.rows.begin
        elif isinstance(way, SlabRun):
            self._first, self._slots, self._each, self._begin = way.first, way.slots, way.each, way.begin
        else:
            self._first, self._slots, self._each, self._begin = way.first, way.slots, way.each, 0
            self._source = torch.tensor(way.source, device=slabs.memory.device)
            self._place = torch.tensor(way.place, device=slabs.memory.device)

    def add(self, group: int, x: Tensor, y: Tensor) -> None:
        weights = self._slabs.span(group, self._first, self._slots)
        if weights is None:
            return
        a, parts = weights
        slots, each = self._slots, self._each
        if self._source is not None and self._place is not None:
            padded = x.new_zeros(slots * each, x.shape[1])
            padded[self._place] = x[self._source]
            delta = y.new_zeros(slots * each, y.shape[1], dtype=torch.float32)
            _add_span(padded.view(slots, each, -1), delta.view(slots, each, -1), a, parts)
            if y.dtype == torch.float32:
                y.index_add_(0, self._source, delta[self._place])
            else:
                y[self._source] += delta[self._place]
            return
        mine = slice(self._begin, self._begin + slots * each)
        if slots == 1:
            u = x[mine].float() @ a[0].T.float()  # [each, ranks of all members]
            for columns, ranks, b in parts:
                if y.dtype == torch.float32:
                    y[mine, columns].addmm_(u[:, ranks], b[0])
                else:
                    y[mine, columns] += u[:, ranks] @ b[0].float()
        else:
            _add_span(x[mine].view(slots, each, -1), y[mine].view(slots, each, -1), a, parts)


def _add_span(x: Tensor, y: Tensor, a: Tensor, parts: Sequence[tuple[slice, slice, Tensor]]) -> None:
    """x: [slots, each, in]; y: [slots, each, out]; a: [slots, ranks of all members, in]; b: [slots, rank, out_m]."""
    u = torch.bmm(x.float(), a.transpose(1, 2).float())  # [slots, each, ranks of all members]
    for columns, ranks, b in parts:
        if y.dtype == torch.float32:
            y[:, :, columns].baddbmm_(u[:, :, ranks], b.float())
        else:
            y[:, :, columns] += torch.bmm(u[:, :, ranks], b.float())


class LoraGroup:
    """The layers of one TargetGroup: one fused base product, one shared shrink product."""

    def __init__(self, number: int, target: TargetGroup, base: FusedLinear, batch: LoraBatch) -> None:
        self.number, self.target, self.base, self.batch = number, target, base, batch
        batch.groups.append(self)
        self.offsets = tuple(accumulate(base.out_features, initial=0))
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._taken = 0

    def output(self, member: int, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of the member]. Computed for all members at the first that asks with this input."""
        bit = 1 << member
        if self._x is not x or self._y is None or self._taken & bit:
            self._x, self._y, self._taken = x, self.all_outputs(x), 0
        y = self._y[..., self.offsets[member] : self.offsets[member + 1]]
        self._taken |= bit
        if self._taken == (1 << self.target.size) - 1:
            self._x = self._y = None
        return y

    def all_outputs(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of all members side by side]"""
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        self.batch.add(self.number, rows, y)
        return y.view(*x.shape[:-1], -1)


class LoraLinear(nn.Module):
    """Stands where one nn.Linear of the base stood."""

    def __init__(self, group: LoraGroup, member: int) -> None:
        super().__init__()
        self.group, self._member = group, member

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(self._member, x)


class PlainLinear(nn.Module):
    """An output layer that no adapter targets: the base's product alone, packed where that is faster."""

    def __init__(self, base: FusedLinear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
