"""Where an adapter's matrices lie in its one stretch of memory. Pure.

`adapter_file` writes a file's matrices by it, a slot takes the whole stretch unchanged (`slot_store`), and the kernels
of `lora` find A and B in the slot by the same numbers. Nothing is padded to the largest rank: a linear the adapter
leaves alone takes no bytes, and a linear of rank 4 takes a fourth of one of rank 16. The A matrices of linears that
share their input lie side by side, so that one product with all of them is one read of the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from lorapool_runtime.weights.targets import TargetGroup

LINE_BYTES = 64  # every group, and every B, starts on a cache line


@dataclass(frozen=True, slots=True)
class Piece:
    """One linear's part: A [rank, in] at element a_at, B [rank, out] (transposed, scale folded in) at element b_at."""

    rank: int
    in_features: int
    out_features: int
    a_at: int
    b_at: int

    def a(self, buffer: np.ndarray) -> np.ndarray:
        """A view [rank, in] into an adapter's buffer."""
        return buffer[self.a_at : self.a_at + self.rank * self.in_features].reshape(self.rank, self.in_features)

    def b(self, buffer: np.ndarray) -> np.ndarray:
        """A view [rank, out] into an adapter's buffer."""
        return buffer[self.b_at : self.b_at + self.rank * self.out_features].reshape(self.rank, self.out_features)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    pieces: tuple[Piece, ...]
    """Per linear, in the order of the groups and their members; rank 0 where the adapter leaves the linear alone."""
    elements: int
    table: np.ndarray
    """int64 [3, linears]: rank, a_at and b_at of each piece."""

    @property
    def rank(self) -> int:
        return max((piece.rank for piece in self.pieces), default=0)


def first_linears(groups: Iterable[TargetGroup]) -> tuple[int, ...]:
    """The number of each group's first linear, counting through all groups."""
    return tuple(accumulate((group.size for group in groups), initial=0))[:-1]


@lru_cache(maxsize=4096)
def lay_out(groups: tuple[TargetGroup, ...], ranks: tuple[int, ...], itemsize: int) -> Layout:
    """ranks: per linear. itemsize: bytes per element. Equal layouts are one object, so that `is` compares them."""
    if len(ranks) != sum(group.size for group in groups):
        raise ValueError(f"{len(ranks)} ranks for {sum(group.size for group in groups)} linears")
    line = LINE_BYTES // itemsize
    pieces: list[Piece] = []
    at, left = 0, iter(ranks)
    for group in groups:
        mine = [next(left) for _ in group.modules]
        a_at = list(accumulate((rank * group.in_features for rank in mine), initial=at))
        at = _up(a_at[-1], line)
        for rank, out, a in zip(mine, group.out_features, a_at[:-1], strict=True):
            pieces.append(Piece(rank, group.in_features, out, a, at))
            at = _up(at + rank * out, line)
    table = np.array([(piece.rank, piece.a_at, piece.b_at) for piece in pieces], np.int64).reshape(-1, 3).T
    return Layout(tuple(pieces), at, np.ascontiguousarray(table))


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
