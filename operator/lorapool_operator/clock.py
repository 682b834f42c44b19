"""Times in the formats of the API objects, and the times of retries. Pure: `now` and randomness are arguments."""

from __future__ import annotations

from datetime import UTC, datetime


def iso(unix_s: float) -> str:
    """RFC 3339 in whole seconds, e.g. `2026-01-31T12:00:00Z`."""
    return datetime.fromtimestamp(int(unix_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def iso_micro(unix_s: float) -> str:
    """RFC 3339 with microseconds, the format of Lease times."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def unix(text: str | None) -> float | None:
    """Converts an RFC 3339 time to seconds since 1970; None if there is no time or it cannot be parsed."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def retry_at_unix_s(
    now: float, attempt: int, jitter: float, *, first_s: float, longest_s: float, asked_s: float | None = None
) -> float:
    """Returns when to retry a transient failure.

    The wait starts at `first_s` and doubles with each attempt up to `longest_s`; half of it is scaled by `jitter`,
    in [0, 1). It is at least the `asked_s` that the source requested, capped at `longest_s`.
    """
    step_s = min(longest_s, first_s * 2.0 ** min(max(attempt, 1) - 1, 20))
    wait_s = step_s * (0.5 + 0.5 * jitter)
    return now + max(wait_s, min(asked_s or 0.0, longest_s))
