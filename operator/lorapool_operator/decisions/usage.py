"""Adds the usage that runtime processes count to an adapter's totals.

A runtime reports cumulative counts per process (boot id). The status keeps the totals and, for each live process, the
share that the totals already include. Adding the same report twice, or again after an operator's restart, is harmless:

    totals += report - share        share := report

A process's share is removed only when the process is known to be gone. A share that is missing would be added again, so
a process beyond the bound of the list is only counted once there is room, or when it is gone.
"""

from __future__ import annotations

from collections.abc import Iterable

from lorapool_api.loraadapter import UsagePart, UsageStatus

COUNTERS = (
    "requests",
    "failed_requests",
    "cancelled_requests",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "loads",
    "load_seconds",
    "residency_seconds",
)
MAX_PARTS = 200
"""More than the pods of a base with the largest number of replicas, before and after a rollout."""


def fold(
    previous: UsageStatus | None, reports: Iterable[UsagePart], gone_boots: Iterable[str], now: str
) -> UsageStatus:
    """Returns the new totals. Processes of `gone_boots` will not report again; their shares are removed."""
    before = previous or UsageStatus()
    gone = frozenset(gone_boots)
    shares = {part.boot_id: part for part in before.parts}
    room = MAX_PARTS - len(shares.keys() - gone)
    totals: dict[str, float] = {name: getattr(before, name) for name in COUNTERS}
    for report in _latest(item for item in reports if item.boot_id in shares or _used(item)):
        share = shares.get(report.boot_id)
        if share is None and report.boot_id not in gone:
            if room <= 0:
                continue
            room -= 1
        latest = report if share is None else _later(share, report)
        for name in COUNTERS:
            totals[name] += getattr(latest, name) - (getattr(share, name) if share else 0)
        shares[report.boot_id] = latest
    parts = sorted((part for boot, part in shares.items() if boot not in gone), key=lambda part: part.boot_id)
    rounded = {name: _tidy(value) for name, value in totals.items()}
    return UsageStatus.model_validate({**rounded, "as_of": now, "parts": parts})


def differs(before: UsageStatus | None, after: UsageStatus) -> bool:
    """True if anything was counted since, or a share can be removed."""
    old = before or UsageStatus()
    return old.model_copy(update={"as_of": after.as_of}) != after


def _used(part: UsagePart) -> bool:
    """False for a process with which the adapter is only registered, as on most replicas."""
    return any(getattr(part, name) for name in COUNTERS)


def _latest(reports: Iterable[UsagePart]) -> list[UsagePart]:
    """Returns one report per process: two digests of an adapter report the same counts, one perhaps slightly older."""
    best: dict[str, UsagePart] = {}
    for report in reports:
        held = best.get(report.boot_id)
        if held is None or (report.requests, report.residency_seconds) > (held.requests, held.residency_seconds):
            best[report.boot_id] = report
    return [_rounded(part) for part in best.values()]


def _rounded(part: UsagePart) -> UsagePart:
    """Rounds to milliseconds, so that a share is equal after a round trip through JSON."""
    return part.model_copy(update={name: _tidy(getattr(part, name)) for name in ("load_seconds", "residency_seconds")})


def _later(share: UsagePart, report: UsagePart) -> UsagePart:
    """The counts of one process never fall, so a lower one is of an older report, which arrived late."""
    return report.model_copy(update={name: max(getattr(share, name), getattr(report, name)) for name in COUNTERS})


def _tidy(value: float) -> float:
    return round(value, 3) if isinstance(value, float) else value
