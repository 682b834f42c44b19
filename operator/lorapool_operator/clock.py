"""Times as the objects spell them, and back. Pure; `now` always comes from the caller."""

from __future__ import annotations

from datetime import UTC, datetime


def iso(unix_s: float) -> str:
    """RFC 3339 in whole seconds, e.g. `2026-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_micro(unix_s: float) -> str:
    """RFC 3339 with microseconds, as Lease times want it."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def unix(text: str | None) -> float | None:
    """Seconds since 1970 of an RFC 3339 time; None for none or nonsense."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
