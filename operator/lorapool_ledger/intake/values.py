"""Bounds of what other processes report, so that one wrong value cannot stop a writer's records. Pure."""

from __future__ import annotations

from functools import cache
from typing import TypeVar, overload

from lorapool_api.common import ApiModel

MOST_TOKENS = 2**40
"""Of one record. No request has a thousandth of it, and the sum of millions of rows stays within 64 bits."""
MOST_REQUEST_NS = 2**44
"""Of the requests of one record: 5 hours."""
MOST_TOTAL = 2**60
"""Of all requests of a process: 36 years in nanoseconds."""
MOST_NS = MOST_TOTAL
MOST_SEQ = 2**53
"""No process writes as many records."""
MOST_TIME_MS = 253_402_300_799_000
"""The last second of the year 9999."""
CLOCK_MS = 300_000
"""A writer's clock that differs by more from the ledger's is wrong."""
_MINUTE_MS = 60_000
_TIMES = {
    **dict.fromkeys(("started_unix_ms", "ended_unix_ms", "at_unix_ms", "opened_unix_ms", "closed_unix_ms"), (1, 1)),
    "minute_unix_s": (1000, _MINUTE_MS),
    "hour_unix_s": (1000, 60 * _MINUTE_MS),
}
"""Fields with times: milliseconds of their unit, and of the span that begins then."""
_Record = TypeVar("_Record", bound=ApiModel)


@overload
def tokens(value: int) -> int: ...
@overload
def tokens(value: None) -> None: ...
def tokens(value: int | None) -> int | None:
    """A count of tokens within bounds."""
    return None if value is None else max(0, min(value, MOST_TOKENS))


def ns(value: int) -> int:
    """A duration within bounds."""
    return max(0, min(value, MOST_NS))


def time_ms(value: int) -> int:
    """A time within the years 1970 to 9999."""
    return max(0, min(value, MOST_TIME_MS))


def text(value: str, most: int) -> str:
    """At most so many characters, none of which PostgreSQL refuses."""
    return value.replace("\x00", "")[:most]


def clock_error_ms(writers_unix_ms: int, own_unix_ms: int) -> int:
    """By how much a writer's clock is ahead of the ledger's, in whole minutes; 0 while it is right."""
    error = writers_unix_ms - own_unix_ms
    return round(error / _MINUTE_MS) * _MINUTE_MS if abs(error) > CLOCK_MS else 0


def on_ledgers_clock(record: _Record, error_ms: int, earliest_ms: int, now_ms: int) -> _Record:
    """The record with its times less the error of its writer's clock.

    A time that cannot be, before `earliest_ms` or after `now_ms`, becomes `now_ms`: that of reception.
    """
    changed = {}
    for name in _times(type(record)):
        unit, span = _TIMES[name]
        value = getattr(record, name)
        at = value * unit - error_ms
        if not earliest_ms - CLOCK_MS - span < at < now_ms + CLOCK_MS:
            at = now_ms // span * span
        if at // unit != value:
            changed[name] = at // unit
    return record.model_copy(update=changed) if changed else record


@cache
def _times(kind: type[ApiModel]) -> tuple[str, ...]:
    return tuple(name for name in kind.model_fields if name in _TIMES)
