"""Periods of time and their UTC-aligned buckets. Pure. All times are whole seconds since 1970."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

MINUTE, HOUR, DAY = 60, 3600, 86400


class Width(StrEnum):
    """Length of a bucket."""

    MINUTE = "1m"
    HOUR = "1h"
    DAY = "1d"

    @property
    def seconds(self) -> int:
        return {Width.MINUTE: MINUTE, Width.HOUR: HOUR, Width.DAY: DAY}[self]


@dataclass(frozen=True, slots=True)
class Period:
    """From `start_unix_s`, inclusive, to `end_unix_s`, exclusive."""

    start_unix_s: int
    end_unix_s: int

    def aligned(self, width: Width) -> Period:
        """The whole buckets that the period touches."""
        size = width.seconds
        return Period(self.start_unix_s // size * size, -(-self.end_unix_s // size) * size)

    def buckets(self, width: Width) -> Iterator[Period]:
        """The aligned buckets that the period touches, in order."""
        whole = self.aligned(width)
        for start in range(whole.start_unix_s, whole.end_unix_s, width.seconds):
            yield Period(start, start + width.seconds)

    @property
    def days(self) -> float:
        return (self.end_unix_s - self.start_unix_s) / DAY


def month_of(unix_s: float) -> str:
    """The UTC month, such as 2026-11."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m")


def month(name: str) -> Period | None:
    """The period of a UTC month such as 2026-11; None if it is none."""
    found = re.fullmatch(r"(20[0-9]{2})-(0[1-9]|1[0-2])", name)
    if found is None:
        return None
    year, number = int(found[1]), int(found[2])
    after = (year + 1, 1) if number == 12 else (year, number + 1)
    return Period(_unix_s(year, number), _unix_s(*after))


def last_days(count: int, now_unix_s: float) -> Period:
    """The last `count` UTC days, today's included, up to the end of today."""
    end = int(now_unix_s) // DAY * DAY + DAY
    return Period(end - count * DAY, end)


def day_text(unix_s: int) -> str:
    """The UTC day, such as 2026-11-30."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d")


def time_text(unix_s: float) -> str:
    """The UTC second, such as 2026-11-30T22:41:05Z."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _unix_s(year: int, number: int) -> int:
    return int(datetime(year, number, 1, tzinfo=UTC).timestamp())
