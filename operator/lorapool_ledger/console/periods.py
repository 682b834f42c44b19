"""The period that a page shows: from its URL, as whole UTC days."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlencode

from lorapool_ledger.reports.periods import DAY, Period, day_text, last_days, month, month_of


@dataclass(frozen=True, slots=True)
class Shown:
    """A period and its name in URLs: `7d`, `30d`, or a month such as `2026-11`."""

    name: str
    label: str
    period: Period

    @property
    def first_day(self) -> str:
        return day_text(self.period.start_unix_s)

    @property
    def last_day(self) -> str:
        return day_text(self.period.end_unix_s - 1)

    @property
    def days(self) -> list[str]:
        return [day_text(start) for start in range(self.period.start_unix_s, self.period.end_unix_s, DAY)]


def shown(name: str, now_unix_s: float) -> Shown:
    """The period of this name; the present month for any other name. A month ends with today."""
    for days in (7, 30):
        if name == f"{days}d":
            return Shown(name, f"Last {days} days", last_days(days, now_unix_s))
    this = month_of(now_unix_s)
    whole = month(name) or month(this)
    assert whole is not None  # this month is one
    today_ends = int(now_unix_s) // DAY * DAY + DAY
    if whole.start_unix_s >= today_ends:
        return shown(this, now_unix_s)
    name = month_of(whole.start_unix_s)
    return Shown(name, name, Period(whole.start_unix_s, min(whole.end_unix_s, today_ends)))


def choices(now_unix_s: float) -> list[Shown]:
    """What a page offers: the last days, and this month with the two before it."""
    months: list[str] = []
    at = now_unix_s
    for _ in range(3):
        months.append(month_of(at))
        first = month(months[-1])
        assert first is not None
        at = first.start_unix_s - 1
    return [shown(name, now_unix_s) for name in ("7d", "30d", *reversed(months))]


def with_query(path: str, given: Iterable[tuple[str, str]]) -> str:
    """The path with the parameters that are not empty."""
    query = urlencode([(name, value) for name, value in given if value])
    return f"{path}?{query}" if query else path
