"""How much longer a step takes with more rows: an estimate from the steps so far. Pure: the caller measures."""

from __future__ import annotations

STEPS_REMEMBERED = 500
"""Older steps count less and less."""
MIN_STEPS = 20
MIN_SPREAD = 0.5
"""Rows by which the steps must differ (standard deviation); steps of one size tell nothing about another."""
ROUNDING = 1e-6


class StepCost:
    """A line through the seconds of decoding steps by their number of rows (least squares, recent steps count more)."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._fixed_s = self._per_row_s = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        """Takes the time of one step that only decoded."""
        keep = 1 - 1 / STEPS_REMEMBERED
        self._weight = self._weight * keep + 1
        self._x = self._x * keep + rows
        self._y = self._y * keep + seconds
        self._xx = self._xx * keep + rows * rows
        self._xy = self._xy * keep + rows * seconds
        self._fit()

    def rows_within(self, rows: int, factor: float, most: int) -> int:
        """The most rows, between `rows` and `most`, of a step that takes at most `factor` times that of `rows`."""
        if not self._per_row_s:
            return most
        extra_s = (factor - 1) * (self._fixed_s + self._per_row_s * rows)
        return max(rows, min(most, rows + int(extra_s / self._per_row_s + ROUNDING)))

    def _fit(self) -> None:
        """Keeps the last line while the steps do not differ enough for a new one."""
        mean = self._x / self._weight
        variance = self._xx / self._weight - mean * mean
        if self._weight < MIN_STEPS or variance < MIN_SPREAD * MIN_SPREAD:
            return
        covariance = self._xy / self._weight - mean * self._y / self._weight
        self._per_row_s = max(0.0, covariance / variance)
        self._fixed_s = max(0.0, self._y / self._weight - self._per_row_s * mean)
