"""The time, as an argument: one value with both clocks, so that a test of five idle minutes takes a microsecond."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Clock:
    now_s: Callable[[], float] = time.monotonic
    """For durations: never jumps."""
    unix_s: Callable[[], float] = time.time
    """For what others read."""
