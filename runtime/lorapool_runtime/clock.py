"""Both clocks as one value that is passed in, so that a test of five idle minutes takes a microsecond."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    now_s: Callable[[], float] = time.monotonic
    """For durations: monotonic."""
    unix_s: Callable[[], float] = time.time
    """For times that other processes read."""

    def now_ns(self) -> int:
        """The monotonic clock in whole nanoseconds."""
        return round(self.now_s() * 1e9)

    def unix_ns(self) -> int:
        return round(self.unix_s() * 1e9)

    def unix_ms(self) -> int:
        return int(self.unix_s() * 1e3)
