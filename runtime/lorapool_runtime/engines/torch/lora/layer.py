"""The LoRA layer: many adapters in one batch, on top of the base's own linear layers.

    y = x W^T + b  +  (x A_s^T) B_s        x: [rows, in]   A_s: [rank, in]   B_s: [rank, out], alpha/r folded in
                                           s: the row's slot, -1 for the base: nothing is added, nothing is multiplied

`LoraBatch.set` decides once per step how all layers of that step add LoRA: a row kernel takes rows in any order and
of any mix of ranks; where there is none, torch multiplies slot by slot. A row only meets the weights of its own slot,
so a value that is not finite stays in its row. The engine thread alone runs these modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.kernels.fused_linear import FusedLinear
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows, adapter_segments, slot_of_each_row
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots, GroupTables
from lorapool_runtime.weights.targets import TargetGroup


class RowKernel(Protocol):
    """One kernel for rows in any order and of any mix of slots and ranks: native code on a CPU, Triton on a GPU."""

    def add(self, y: Tensor, x: Tensor, row_slots: Tensor, group: GroupTables) -> None:
        """y[i] += B_s A_s x[i] for s = row_slots[i]. Rows of slot -1 and of rank 0 keep every bit.

        y: [rows, out of all members] and x: [rows, in], contiguous; row_slots: int32 [rows] on x's device.
        On a GPU it must not read a tensor's value on the host, so that a CUDA graph can capture it.
        """
        ...


@runtime_checkable
class StepKernel(RowKernel, Protocol):
    """A row kernel that is prepared once per step with the rows of every slot, as Triton's is."""

    def prepare(self, batch: Sequence[SlotRows]) -> Callable[[Tensor, Tensor, GroupTables], None]:
        """Returns the `add` of the next step, to be called with y, x and the group."""
        ...


@dataclass(frozen=True, slots=True)
class _RowsWithSlots:
    """How one step adds LoRA to the rows that some layers are called with."""

    row_slots: Tensor | None = None  # int32 [rows], for a row kernel
    prepared: Callable[[Tensor, Tensor, GroupTables], None] | None = None  # the step's `add` of a step kernel
    torch_ops: tuple[TorchLoraOp, ...] = ()  # without a kernel


class LoraBatch:
    """The state that all LoRA layers read during a step. An engine has one and passes it to every group."""

    def __init__(self) -> None:
        self.slots: AdapterSlots | None = None
        self.groups: list[LoraGroup] = []
        self.kernel: RowKernel | None = None
        self.output_group: int | None = None
        """The number of the output layer's group, which is called with the rows that get logits only."""
        self.segments: tuple[SlotRows, ...] = ()
        """The step's rows that get LoRA, for the layers that torch computes: the embedding and experts."""
        self._rows = self._kept = _RowsWithSlots()

    def set(self, batch: Sequence[SlotRows], kept: Sequence[SlotRows] | None = None) -> None:
        """Prepares the next step. `batch` covers its rows from 0 on without a gap.

        kept: the same of the rows that get logits, in their order; None: all rows do.
        """
        self._rows = self._kept = self._prepare(batch)
        self.segments = adapter_segments(batch) if self.slots is not None and self.slots.any_by_torch else ()
        if kept is not None and self.output_group is not None and self._rows is not _NO_ROWS:
            self._kept = self._prepare(kept)

    def _prepare(self, batch: Sequence[SlotRows]) -> _RowsWithSlots:
        slots = self.slots
        if slots is None or all(rows.slot == BASE_SLOT for rows in batch):
            return _NO_ROWS
        if isinstance(self.kernel, StepKernel):
            return _RowsWithSlots(prepared=self.kernel.prepare(batch))
        if self.kernel is not None:
            row_slots = torch.tensor(slot_of_each_row(batch), dtype=torch.int32, device=slots.memory.device)
            return _RowsWithSlots(row_slots=row_slots)
        return _RowsWithSlots(torch_ops=tuple(TorchLoraOp(segment, slots) for segment in adapter_segments(batch)))

    def use(self, row_slots: Tensor) -> None:
        """Prepares a captured graph: the kernel reads the slots from a tensor that the caller keeps and overwrites.

        row_slots: int32 [rows], of which each gets logits. No slot may hold an adapter of an embedding or of experts.
        """
        self._rows = self._kept = _RowsWithSlots(row_slots=row_slots)
        self.segments = ()

    def add(self, group: int, x: Tensor, y: Tensor) -> None:
        """x: [rows, in]; y: [rows, out of all members], added to in place."""
        rows = self._kept if group == self.output_group else self._rows
        if rows.row_slots is not None:
            assert self.kernel is not None
            assert self.slots is not None
            self.kernel.add(y, x, rows.row_slots, self.slots.groups[group])
        if rows.prepared is not None:
            assert self.slots is not None
            rows.prepared(y, x, self.slots.groups[group])
        for op in rows.torch_ops:
            op.add(group, x, y)


class TorchLoraOp:
    """Torch products for adjacent rows of one slot, in float32 and rounded once to the base's type, as peft computes.

    Rounding the shrink product to bfloat16 as well would make log-probabilities differ from peft's several times as
    much.
    """

    def __init__(self, rows: SlotRows, slots: AdapterSlots) -> None:
        self._slots, self._slot, self._rows = slots, rows.slot, slice(rows.begin, rows.end)

    def add(self, group: int, x: Tensor, y: Tensor) -> None:
        """x: [rows, in]; y: [rows, out of all members], added to in place."""
        matrices = self._slots.matrices(group, self._slot)
        if matrices is None:
            return
        u = x[self._rows].float() @ matrices.a.T.float()  # [rows of the slot, ranks of all members]
        for columns, ranks, b in matrices.members:
            if y.dtype == torch.float32:
                y[self._rows, columns].addmm_(u[:, ranks], b)
            else:
                y[self._rows, columns] += u[:, ranks] @ b.float()


_NO_ROWS = _RowsWithSlots()


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
        """x: [..., in] -> [..., out of the member]. The first member that passes an input computes all members."""
        bit = 1 << member
        if self._x is not x or self._y is None or self._taken & bit:
            self._x, self._y, self._taken = x, self.all_outputs(x), 0
        y = self._y[..., self.offsets[member] : self.offsets[member + 1]]
        self._taken |= bit
        if self._taken == (1 << self.target.size) - 1:
            self._x = self._y = None
        return y

    def all_outputs(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of all members, concatenated]"""
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        self.batch.add(self.number, rows, y)
        return y.view(*x.shape[:-1], -1)


class LoraLinear(nn.Module):
    """Replaces one nn.Linear of the base."""

    def __init__(self, group: LoraGroup, member: int) -> None:
        super().__init__()
        self.group, self._member = group, member

    def forward(self, x: Tensor) -> Tensor:
        return self.group.output(self._member, x)


class LoraEmbedding(nn.Module):
    """Replaces the embedding of tokens: row t of A, [tokens, rank], times B is added to token t's."""

    def __init__(self, embedding: nn.Embedding, number: int, batch: LoraBatch) -> None:
        super().__init__()
        self.embedding, self._number, self._batch = embedding, number, batch

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids: [..., rows] of one sequence of rows -> [..., rows, hidden]"""
        y: Tensor = self.embedding(token_ids)
        if self._batch.segments:
            self._add(token_ids.reshape(-1), y.view(-1, y.shape[-1]))
        return y

    def _add(self, token_ids: Tensor, y: Tensor) -> None:
        slots, factor = self._batch.slots, getattr(self.embedding, "embed_scale", 1.0)
        assert slots is not None
        for segment in self._batch.segments:
            matrices = slots.member_matrices(self._number, 0, segment.slot)
            if matrices is not None:
                a, b = matrices
                rows = slice(segment.begin, segment.end)
                added = a.view(-1, b.shape[0])[token_ids[rows]].float() @ b.float()
                y[rows] += (added * factor).to(y.dtype)
