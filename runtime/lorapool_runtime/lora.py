"""The LoRA layer: many adapters in one batch, on top of the base's own linear layers.

    y = x W^T + b  +  (x A_s^T) B_s        x: [rows, in]   A_s: [rank, in]   B_s: [rank, out], alpha/r folded in
                                           s: the row's slot, -1 for the base: nothing is added, nothing is multiplied

Rows come ordered by slot (`scheduler`), so a step is a short list of ways, chosen once per step and used by every
layer: a segment (one slot, plain products), a slab run (neighbouring slots, one batched product with the slab itself
as operand), or the same over scattered rows. Rows meet only their own slot's weights: what is not finite in one
row stays there. `model` puts these modules in place; the engine thread alone runs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lorapool_runtime.interface import BASE_SLOT
from lorapool_runtime.linear import FusedLinear
from lorapool_runtime.slabs import Slabs
from lorapool_runtime.targets import TargetGroup

_MAX_SCATTERED_ROWS = 8  # rows of one slot up to which scattering into a slab run beats a product per slot
_MAX_PADDING = 3  # scattered: padded rows per real row that are still cheaper than another launch
_MAX_GAP = 2  # unused slots between two used ones that a run reads over


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows [begin, end) of the batch belong to `slot`."""

    slot: int
    begin: int
    end: int

    @property
    def count(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Segment:
    rows: Rows


@dataclass(frozen=True, slots=True)
class SlabRun:
    """Slots first..first+slots-1, `each` adjacent rows per slot, starting at row `begin`."""

    first: int
    slots: int
    each: int
    begin: int


@dataclass(frozen=True, slots=True)
class ScatteredRun:
    """Like SlabRun with unequal counts or unused slots between: row source[i] sits at place[i] of [slots * each]."""

    first: int
    slots: int
    each: int
    source: tuple[int, ...]
    place: tuple[int, ...]


Way = Segment | SlabRun | ScatteredRun


def choose_ways(pieces: Iterable[Rows]) -> tuple[Way, ...]:
    """`pieces`: in the batch's order; slots ascend within each stretch. Base rows need nothing."""
    ways: list[Way] = []
    run: list[Rows] = []
    for piece in _merged(pieces):
        if piece.slot == BASE_SLOT:
            continue
        if run and not _continues(run, piece):
            ways += _ways_of(run)
            run = []
        run.append(piece)
    return tuple(ways + _ways_of(run))


def _merged(pieces: Iterable[Rows]) -> list[Rows]:
    merged: list[Rows] = []
    for piece in pieces:
        if merged and merged[-1].slot == piece.slot and merged[-1].end == piece.begin:
            merged[-1] = Rows(piece.slot, merged[-1].begin, piece.end)
        else:
            merged.append(piece)
    return merged


def _continues(run: list[Rows], piece: Rows) -> bool:
    last, gap = run[-1], piece.slot - run[-1].slot - 1
    if gap < 0 or piece.begin != last.end:
        return False
    if piece.count == last.count and gap == 0:
        return True
    return gap <= _MAX_GAP and max(piece.count, *(rows.count for rows in run)) <= _MAX_SCATTERED_ROWS


def _ways_of(run: list[Rows]) -> list[Way]:
    if len(run) < 2:
        return [Segment(rows) for rows in run]
    first, slots, each = run[0].slot, run[-1].slot - run[0].slot + 1, max(rows.count for rows in run)
    if len(run) == slots and all(rows.count == each for rows in run):
        return [SlabRun(first, slots, each, run[0].begin)]
    if each > _MAX_SCATTERED_ROWS or slots * each > (1 + _MAX_PADDING) * sum(rows.count for rows in run):
        return [Segment(rows) for rows in run]
    source = tuple(row for rows in run for row in range(rows.begin, rows.end))
    place = tuple((rows.slot - first) * each + i for rows in run for i in range(rows.count))
    return [ScatteredRun(first, slots, each, source, place)]


class LoraBatch:
    """What the layers read during a step. One per engine, handed to every group."""

    def __init__(self) -> None:
        self.slabs: Slabs | None = None
        self._ways: tuple[tuple[Way, Tensor | None, Tensor | None], ...] = ()

    def set(self, ways: tuple[Way, ...], device: torch.device) -> None:
        self._ways = tuple(
            (way, torch.tensor(way.source, device=device), torch.tensor(way.place, device=device))
            if isinstance(way, ScatteredRun)
            else (way, None, None)
            for way in ways
        )

    def add(self, group: int, offsets: tuple[int, ...], x: Tensor, y: Tensor) -> None:
        """x: [rows, in]; y: [rows, out of all members], added to in place."""
        slabs = self.slabs
        if not self._ways or slabs is None:
            return
        ranks, a, b = slabs.ranks[group], slabs.a[group], slabs.b[group]
        for way, source, place in self._ways:
            if isinstance(way, Segment):
                first, slots, each, begin = way.rows.slot, 1, way.rows.count, way.rows.begin
            else:
                first, slots, each = way.first, way.slots, way.each
                begin = way.begin if isinstance(way, SlabRun) else 0
            rank = max(ranks[first : first + slots])
            if rank == 0:
                continue
            shrink = a[first : first + slots, :rank]  # [slots, rank, members, in]
            expand = [slab[first : first + slots, :rank] for slab in b]  # members x [slots, rank, out]
            if source is None or place is None:
                mine = slice(begin, begin + slots * each)
                _add_run(x[mine].view(slots, each, -1), y[mine].view(slots, each, -1), shrink, expand, offsets)
            else:
                padded = x.new_zeros(slots * each, x.shape[1])
                padded[place] = x[source]
                delta = y.new_zeros(slots, each, y.shape[1])
                _add_run(padded.view(slots, each, -1), delta, shrink, expand, offsets)
                y.index_add_(0, source, delta.view(slots * each, -1)[place])


def _add_run(x: Tensor, y: Tensor, shrink: Tensor, expand: list[Tensor], offsets: tuple[int, ...]) -> None:
    """x: [slots, each, in], y: [slots, each, out]; shrink: [slots, rank, members, in]; expand: [slots, rank, out_j]."""
    slots, rank, members, width = shrink.shape
    u = torch.bmm(x, shrink.reshape(slots, rank * members, width).transpose(1, 2))  # [slots, each, rank * members]
    by_member = u.view(slots, -1, rank, members).permute(3, 0, 1, 2).contiguous()  # [members, slots, each, rank]
    for member, weights in enumerate(expand):
        y[:, :, offsets[member] : offsets[member + 1]].baddbmm_(by_member[member], weights)


class LoraGroup:
    """The layers of one TargetGroup: one fused base product, one shared shrink product."""

    def __init__(self, number: int, target: TargetGroup, base: FusedLinear, batch: LoraBatch) -> None:
        self.number, self.target, self.base, self.batch = number, target, base, batch
        self.offsets = tuple(accumulate(base.out_features, initial=0))
        self._x: Tensor | None = None
        self._y: Tensor | None = None
        self._taken = 0

    def output(self, member: int, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out of the member]. Computed for all members at the first that asks with this input."""
        bit = 1 << member
        if self._x is not x or self._y is None or self._taken & bit:
            self._x, self._y, self._taken = x, self._compute(x), 0
        y = self._y[..., self.offsets[member] : self.offsets[member + 1]]
        self._taken |= bit
        if self._taken == (1 << self.target.size) - 1:
            self._x = self._y = None
        return y

    def _compute(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        self.batch.add(self.number, self.offsets, rows, y)
        return y.view(*x.shape[:-1], -1)


class LoraLinear(nn.Module):
    """Stands where one nn.Linear of the base stood."""

    def __init__(self, group: LoraGroup, member: int) -> None:
        super().__init__()
        self._group, self._member = group, member

    def forward(self, x: Tensor) -> Tensor:
        return self._group.output(self._member, x)


class PlainLinear(nn.Module):
    """An output layer that no adapter targets: the base's product alone, packed where that is faster."""

    def __init__(self, base: FusedLinear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
