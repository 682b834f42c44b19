"""How the time of a step is divided among its rows: whole nanoseconds, which add up to the step exactly. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_UNITS = 1000
"""Units of one nanosecond in which weights are counted, as whole numbers."""


@dataclass(frozen=True, slots=True)
class StepWeights:
    """What the parts of a row cost, in thousandths of a nanosecond. Only their ratios matter."""

    prefill: int
    """A token of a prompt."""
    decode: int
    """A generated token."""
    context: int
    """A token before it that it attends to."""
    rank: int
    """A rank of its adapter."""

    @classmethod
    def of_ns(cls, *, prefill: float, decode: float, context: float, rank: float) -> StepWeights:
        return cls(*(round(value * _UNITS) for value in (prefill, decode, context, rank)))

    def of_decode(self, context: int, rank: int) -> int:
        """The weight of a row with one token and so many before it."""
        return self.decode + self.context * (context + 1) + self.rank * rank

    def of_prefill(self, tokens: int, context: int, rank: int) -> int:
        """The weight of a row with a part of a prompt and so many tokens before it."""
        attended = tokens * context + tokens * (tokens + 1) // 2
        return (self.prefill + self.rank * rank) * tokens + self.context * attended


EQUAL = StepWeights(prefill=1, decode=1, context=0, rank=0)
"""Every token costs the same."""


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Whole parts of `total` in the ratio of the weights, by the largest remainder. Equal parts where all are 0."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    parts = [total * weight // whole for weight in weights]
    rest = total - sum(parts)
    if rest:
        by_remainder = sorted(range(len(parts)), key=lambda one: total * weights[one] % whole, reverse=True)
        for one in by_remainder[:rest]:
            parts[one] += 1
    return parts
