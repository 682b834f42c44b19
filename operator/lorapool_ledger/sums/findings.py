"""What a check of the reconciliation reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """A place where the two sides differ at present."""

    check: str
    """R1 to R5."""
    subject: str
    """What does not add up: process and account, attempt, or hour. At most 400 characters, the same in every run."""
    tokens: int
    """By how many tokens (R3: nanoseconds) the sides differ; at least 1."""
    message: str
    """Both sides, in one sentence."""


def differences(expected: dict[str, int], actual: dict[str, int]) -> str:
    """The names and values that differ, as text; empty when none does."""
    return ", ".join(
        f"{name} {actual.get(name, 0)} instead of {value}"
        for name, value in expected.items()
        if actual.get(name, 0) != value
    )


def distance(expected: dict[str, int], actual: dict[str, int], names: tuple[str, ...]) -> int:
    """By how much the named counts differ in all."""
    return sum(abs(expected.get(name, 0) - actual.get(name, 0)) for name in names)
