"""How the rows of one step get their LoRA: decided once, spent by every layer. Pure.

`lora` calls `choose_ways` before a step and runs what it returns. Rows of the base need nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorapool_runtime.interface import BASE_SLOT
from lorapool_runtime.layout import Layout

_MAX_KERNEL_ROWS = 16  # adjacent rows of one slot up to which the row kernel beats a product per slot
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
class KernelRows:
    """The row kernel over all rows of the step: -1 where another way, or none, adds to the row."""

    row_slots: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    rows: Rows


@dataclass(frozen=True, slots=True)
class SlabRun:
    """Slots first..first+slots-1 of one layout, `each` adjacent rows per slot, starting at row `begin`."""

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


Way = KernelRows | Segment | SlabRun | ScatteredRun


def choose_ways(pieces: Iterable[Rows], layouts: Sequence[Layout | None], *, kernel: bool) -> tuple[Way, ...]:
    """`pieces`: in the batch's order. `layouts`: by slot; equal ones are the same object. `KernelRows` comes first."""
    merged = _merged(pieces)
    if kernel:
        return _with_kernel(merged)
    ways: list[Way] = []
    run: list[Rows] = []
    for piece in merged:
        if piece.slot == BASE_SLOT:
            continue
        if run and not _continues(run, piece, layouts):
            ways += _ways_of(run)
            run = []
        run.append(piece)
    return tuple(ways + _ways_of(run))


def _with_kernel(pieces: list[Rows]) -> tuple[Way, ...]:
    row_slots = [BASE_SLOT] * (pieces[-1].end if pieces else 0)
    segments: list[Way] = []
    for piece in pieces:
        if piece.count > _MAX_KERNEL_ROWS:
            if piece.slot != BASE_SLOT:
                segments.append(Segment(piece))
        else:
            row_slots[piece.begin : piece.end] = [piece.slot] * piece.count
    if any(slot != BASE_SLOT for slot in row_slots):
        return (KernelRows(tuple(row_slots)), *segments)
    return tuple(segments)


def _merged(pieces: Iterable[Rows]) -> list[Rows]:
    merged: list[Rows] = []
    for piece in pieces:
        if merged and merged[-1].slot == piece.slot and merged[-1].end == piece.begin:
            merged[-1] = Rows(piece.slot, merged[-1].begin, piece.end)
        else:
            merged.append(piece)
    return merged


def _continues(run: list[Rows], piece: Rows, layouts: Sequence[Layout | None]) -> bool:
    last, gap = run[-1], piece.slot - run[-1].slot - 1
    if gap < 0 or piece.begin != last.end or layouts[piece.slot] is not layouts[last.slot]:
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
