"""The requests of one base: which adapter is asked for, when, and how long the answer takes.

Popularity follows Zipf's law, the rate follows the hours of the day, and now and then an unpopular adapter becomes
popular for some minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHUNK_S = 60.0

Arrivals = tuple[list[float], list[int], list[float]]
"""Times in seconds, adapters, and durations of the answers in seconds."""


@dataclass(frozen=True, slots=True)
class Burst:
    """One adapter gets more requests for a while."""

    start_s: float
    seconds: float
    adapter: int
    per_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    adapters: int
    per_s: float
    """Mean number of requests per second, without bursts."""
    zipf: float = 1.0
    """Exponent of the popularity: the share of the adapter of rank r is proportional to r to the power of -zipf."""
    swing: float = 0.7
    """Share by which the rate rises and falls over a day."""
    day_s: float = 86400.0
    """Length of a day; a shorter one makes the load rise and fall faster."""
    answer_s: float = 8.0
    """Mean duration of an answer."""
    bursts: tuple[Burst, ...] = ()

    def rate(self, at_s: float) -> float:
        """Requests per second at a time of the day; the least at an eighth of it, the most half a day later."""
        return self.per_s * (1 - self.swing * math.cos(2 * math.pi * (at_s / self.day_s - 0.125)))

    def arrivals(self, seconds: float, rng: np.random.Generator) -> Iterator[Arrivals]:
        """Yields the requests of each minute, in order."""
        shares = np.arange(1, self.adapters + 1, dtype=np.float64) ** -self.zipf
        edges = np.cumsum(shares / shares.sum())
        start_s = 0.0
        while start_s < seconds:
            length_s = min(CHUNK_S, seconds - start_s)
            count = rng.poisson(self.rate(start_s + length_s / 2) * length_s)
            chosen = np.minimum(np.searchsorted(edges, rng.random(count)), self.adapters - 1)
            yield self._chunk(start_s, length_s, chosen, rng)
            start_s += length_s

    def _chunk(
        self, start_s: float, length_s: float, chosen: npt.NDArray[np.int64], rng: np.random.Generator
    ) -> Arrivals:
        times = [start_s + rng.random(len(chosen)) * length_s]
        adapters = [chosen]
        for burst in self.bursts:
            begin_s, end_s = max(start_s, burst.start_s), min(start_s + length_s, burst.start_s + burst.seconds)
            if begin_s < end_s:
                count = rng.poisson(burst.per_s * (end_s - begin_s))
                times.append(begin_s + rng.random(count) * (end_s - begin_s))
                adapters.append(np.full(count, burst.adapter))
        at, which = np.concatenate(times), np.concatenate(adapters)
        order = np.argsort(at, kind="stable")
        # many short answers and a few long ones, with the given mean
        durations = rng.lognormal(math.log(self.answer_s) - 0.32, 0.8, len(at))
        return at[order].tolist(), which[order].tolist(), durations.tolist()
