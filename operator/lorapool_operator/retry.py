"""When a transient failure is tried again. Pure: the random part comes in as an argument."""

from __future__ import annotations


def retry_at_unix_s(
    now: float, attempt: int, jitter: float, *, first_s: float, longest_s: float, asked_s: float | None = None
) -> float:
    """`first_s`, doubled with each attempt up to `longest_s`, half of it random; not sooner than the source asked."""
    step_s = min(longest_s, first_s * 2.0 ** min(max(attempt, 1) - 1, 20))
    wait_s = step_s * (0.5 + 0.5 * jitter)
    return now + max(wait_s, min(asked_s or 0.0, longest_s))
