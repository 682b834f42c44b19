"""How the rows of one step get their LoRA: decided once, spent by every layer. Pure.

`lora` calls `choose_ways` before a step and runs what it returns. Rows of the base need nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.lora.way_costs import WayCosts
from lorapool_runtime.weights.layout import Layout


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


def choose_ways(
    pieces: Iterable[Rows], layouts: Sequence[Layout | None], costs: WayCosts, *, kernel: bool
) -> tuple[Way, ...]:
    """The cheapest by `costs`. `pieces`: in the batch's order. `layouts`: by slot; equal ones are the same object.
    `KernelRows` comes first."""
    merged = _merged(pieces)
    if kernel:
        return _with_kernel(merged, costs)
    ways: list[Way] = []
    run: list[Rows] = []
    for piece in merged:
        if piece.slot == BASE_SLOT:
            continue
        if run and not _may_share(run[-1], piece, layouts):
            ways += _cheapest(run, costs)
            run = []
        run.append(piece)
    return tuple(ways + _cheapest(run, costs))


def _with_kernel(pieces: list[Rows], costs: WayCosts) -> tuple[Way, ...]:
    row_slots = [BASE_SLOT] * (pieces[-1].end if pieces else 0)
    segments: list[Way] = []
    for piece in pieces:
        if piece.slot == BASE_SLOT:
            continue
        if costs.prefers_kernel(piece.count):
            row_slots[piece.begin : piece.end] = [piece.slot] * piece.count
        else:
            segments.append(Segment(piece))
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


def _may_share(last: Rows, piece: Rows, layouts: Sequence[Layout | None]) -> bool:
    """Whether one product may cover both: adjacent rows, ascending slots, matrices at the same places."""
    return piece.begin == last.end and piece.slot > last.slot and layouts[piece.slot] is layouts[last.slot]


def _cheapest(run: list[Rows], costs: WayCosts) -> list[Way]:
    """Cuts `run` where its parts cost least in sum; no product spans more than twice as many slots as it has pieces."""
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n pieces: the cost, where the last part begins
    for end in range(1, len(run) + 1):
        least = (best[end - 1][0] + costs.segment(run[end - 1].count), end - 1)
        for begin in range(end - 2, -1, -1):
            part = run[begin:end]
            if _span(part) > 2 * len(part):
                break
            least = min(least, (best[begin][0] + _cost(part, costs), begin))
        best.append(least)
    ways: list[Way] = []
    end = len(run)
    while end:
        begin = best[end][1]
        ways.append(_way(run[begin:end]))
        end = begin
    return ways[::-1]


def _span(part: list[Rows]) -> int:
    return part[-1].slot - part[0].slot + 1


def _is_even(part: list[Rows]) -> bool:
    return len(part) == _span(part) and all(rows.count == part[0].count for rows in part)


def _cost(part: list[Rows], costs: WayCosts) -> float:
    return costs.run(_span(part), max(rows.count for rows in part), scattered=not _is_even(part))


def _way(part: list[Rows]) -> Way:
    if len(part) == 1:
        return Segment(part[0])
    first, slots, each = part[0].slot, _span(part), max(rows.count for rows in part)
    if _is_even(part):
        return SlabRun(first, slots, each, part[0].begin)
    source = tuple(row for rows in part for row in range(rows.begin, rows.end))
    place = tuple((rows.slot - first) * each + i for rows in part for i in range(rows.count))
    return ScatteredRun(first, slots, each, source, place)
