"""The positions of an adapter's matrices in its one contiguous buffer. Pure.

The reader writes the matrices of a file at these positions, a slot takes the whole buffer unchanged, and the LoRA
kernels find A and B by the same numbers. Nothing is padded to the largest rank: a linear layer that the adapter does
not target takes no bytes. The A matrices of layers that share their input are contiguous, so that one product with
all of them reads the input once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

from lorapool_runtime.weights.targets import TargetGroup

LINE_BYTES = 64  # every group and every B starts on a cache line


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One layer: A [rank, in] at element a_at, B [rank, out] (transposed, with the scale folded in) at b_at.

    `rank` counts the rows of all experts, one expert after the other. The A of an embedding is transposed, [in, rank].
    """

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
    linears: tuple[PackedLinear, ...]
    """In the order of the groups and their members; rank 0 for a layer that the adapter does not target."""
    elements: int
    table: np.ndarray
    """int64 [3, linears]: rank, a_at and b_at."""
    rank: int = 0
    """The largest rank of a linear or output layer, which kernels compute."""


def first_linears(groups: Iterable[TargetGroup]) -> tuple[int, ...]:
    """The index of each group's first layer among the layers of all groups."""
    return tuple(accumulate((group.size for group in groups), initial=0))[:-1]


@lru_cache(maxsize=4096)
def lay_out(groups: tuple[TargetGroup, ...], ranks: tuple[int, ...], itemsize: int) -> Layout:
    """The layout of an adapter. ranks: one per linear layer; itemsize: bytes per element.

    Equal arguments return the same object. Raises ValueError where the number of ranks is not that of the layers.
    """
    if len(ranks) != sum(group.size for group in groups):
        raise ValueError(f"{len(ranks)} ranks for {sum(group.size for group in groups)} linears")
    line = LINE_BYTES // itemsize  # elements
    linears: list[PackedLinear] = []
    at, left = 0, iter(ranks)
    for group in groups:
        group_ranks = [next(left) * group.experts for _ in group.modules]
        a_at = list(accumulate((rank * group.in_features for rank in group_ranks), initial=at))
        at = _round_up(a_at[-1], line)
        for rank, out, a in zip(group_ranks, group.out_features, a_at[:-1], strict=True):
            linears.append(PackedLinear(rank, group.in_features, out, a, at))
            at = _round_up(at + rank * out, line)
    table = np.array([(linear.rank, linear.a_at, linear.b_at) for linear in linears], np.int64).reshape(-1, 3).T
    kernels = [group.by_kernel for group in groups for _ in group.modules]
    rank = max((rank for rank, by_kernel in zip(ranks, kernels, strict=True) if by_kernel), default=0)
    return Layout(tuple(linears), at, np.ascontiguousarray(table), rank)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
