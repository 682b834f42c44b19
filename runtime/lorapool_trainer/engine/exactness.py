"""Measures to how many rows a cycle must be padded so that each row's bits do not depend on the number of rows.

A matrix product may use another algorithm for few rows, which adds in another order. Each shape of the base's weights
is multiplied with the first rows of one input, in both directions, with growing numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MULTIPLES = (1, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class RowPadding:
    floor: int
    """Least number of rows."""
    multiple: int

    def rows(self, tokens: int) -> int:
        return max(self.floor, -(-tokens // self.multiple) * self.multiple)


NO_PADDING = RowPadding(1, 1)


def measure_padding(linears: Iterable[nn.Linear], most_rows: int) -> RowPadding:
    """The smallest multiple, and for it the smallest floor, above which all tested numbers of rows give the same bits.

    Without any such, all cycles have `most_rows` rows.
    """
    weights = {tuple(linear.weight.shape): linear.weight for linear in linears}
    for multiple in _MULTIPLES:
        counts = _row_counts(most_rows, multiple)
        floor = max(_floor(matrix, counts) for weight in weights.values() for matrix in (weight, weight.t()))
        if floor < counts[-1]:
            return RowPadding(floor, multiple)
    return RowPadding(most_rows, _MULTIPLES[-1])


def _row_counts(most: int, multiple: int) -> list[int]:
    """Powers of two, numbers between them and their neighbours that are multiples, in order; the last is `most`."""
    steps = [2**power * part // 4 for power in range(3, most.bit_length() + 1) for part in (4, 5, 6, 7)]
    near = {step + multiple * by for step in steps for by in (-1, 0, 1)}
    rounded = {max(1, count // multiple) * multiple for count in near if count > 0}
    return [*sorted(count for count in rounded if count < most), -(-most // multiple) * multiple]


def _floor(weight: Tensor, counts: list[int]) -> int:
    """The smallest of the counts from which on each gives the same bits as the largest."""
    with torch.no_grad():
        drawn = torch.Generator(weight.device).manual_seed(counts[-1])
        x = torch.randn(counts[-1], weight.shape[1], dtype=weight.dtype, device=weight.device, generator=drawn)
        want = torch.nn.functional.linear(x, weight)
        floor = counts[-1]
        for count in reversed(counts[:-1]):
            if not torch.equal(torch.nn.functional.linear(x[:count], weight), want[:count]):
                break
            floor = count
    return floor
