"""What each way to add LoRA costs on this machine, as measured: `ways` chooses by it. Pure.

`way_probe` measures one when the engine starts. All times are microseconds for one group of linears at one common rank:
only their proportions decide, and these hardly depend on the rank.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

RUN_SLOTS = 4
"""Slots in the slab run that is measured."""


@dataclass(frozen=True, slots=True)
class WayCosts:
    rows: tuple[int, ...]
    """Rows of one slot at which was measured, ascending; between them is interpolated, beyond them extended."""
    segment_us: tuple[float, ...]
    """A product for one slot with so many rows."""
    run_us: tuple[float, ...] | None
    """A slab run over RUN_SLOTS slots with so many rows each. None where there is a kernel: only a segment is weighed
    against that."""
    scatter_us: tuple[float, ...] | None
    """What scattering adds to that run: rows moved to their places and their results back."""
    kernel_us: tuple[float, ...] | None = None
    """The row kernel for one slot with so many rows; None: there is none."""

    def __post_init__(self) -> None:
        times = [one for one in (self.segment_us, self.run_us, self.scatter_us, self.kernel_us) if one is not None]
        if len(self.rows) < 2 or any(a >= b for a, b in pairwise(self.rows)) or self.rows[0] < 1:
            raise ValueError(f"rows must ascend: {self.rows}")
        if any(len(one) != len(self.rows) or not all(0 <= t < float("inf") for t in one) for one in times):
            raise ValueError("every way needs one finite time for each number of rows")

    def segment(self, rows: int) -> float:
        return _at(self.rows, self.segment_us, rows)

    def kernel(self, rows: int) -> float:
        assert self.kernel_us is not None  # callers know whether there is one
        return _at(self.rows, self.kernel_us, rows)

    def run(self, slots: int, each: int, *, scattered: bool) -> float:
        """One product over `slots` slots: the launch is paid once, the rest grows with the slots."""
        assert self.run_us is not None  # callers know that there is no kernel
        assert self.scatter_us is not None
        whole = _at(self.rows, self.run_us, each) + (_at(self.rows, self.scatter_us, each) if scattered else 0.0)
        launch = min(self.segment(1), whole)
        return launch + (whole - launch) * slots / RUN_SLOTS

    def prefers_kernel(self, rows: int) -> bool:
        return self.kernel_us is not None and self.kernel(rows) <= self.segment(rows)

    @property
    def kernel_rows(self) -> int:
        """The most rows of one slot, of those measured, at which the kernel is chosen."""
        return max((rows for rows in self.rows if self.prefers_kernel(rows)), default=0)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WayCosts:
        """Raises ValueError for anything but what `to_json` writes."""
        try:
            found: Mapping[str, Any] = json.loads(text)
            return cls(
                rows=tuple(int(n) for n in found["rows"]),
                segment_us=_floats(found["segment_us"]),
                run_us=_floats_or_none(found["run_us"]),
                scatter_us=_floats_or_none(found["scatter_us"]),
                kernel_us=_floats_or_none(found["kernel_us"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no way costs: {error!r}") from error


def _floats(values: list[float]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _floats_or_none(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else _floats(values)


def _at(rows: tuple[int, ...], times: tuple[float, ...], wanted: int) -> float:
    right = min(max(bisect_left(rows, wanted), 1), len(rows) - 1)
    left = right - 1
    slope = (times[right] - times[left]) / (rows[right] - rows[left])
    return max(0.0, times[left] + slope * (wanted - rows[left]))


USUAL = WayCosts(
    rows=(1, 4, 16, 64, 256),
    segment_us=(41, 55, 72, 160, 340),
    run_us=(110, 140, 290, 640, 1400),
    scatter_us=(60, 80, 120, 300, 900),
    kernel_us=(15, 25, 57, 176, 600),
)
"""Two cores with AVX2, float32, SmolLM2-135M: for whoever has not measured."""
