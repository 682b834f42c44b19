"""Whether the ledger adds up and how far behind its writers it is; what was refused; waits for adapters."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from lorapool_ledger.reports.periods import HOUR, Period
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.reports.usage import source_of, within
from lorapool_ledger.store.tables import (
    api_key,
    attempt_closed,
    boot,
    dirty_hour,
    finding,
    gateway,
    refusal_minute,
    residency,
)

CHECKS = {
    "R1": "records of a process add up to the totals that it counted apart",
    "R2": "every attempt that was sent has a record of its runtime, a refusal, or a process that died",
    "R3": "busy and idle time of a pod add up to its uptime",
    "R4": "daily and hourly sums equal the records",
    "R5": "no more tokens were delivered than computed",
}
LATE_S = 120
"""A writer that has not been heard of for this long is shown as late."""


@dataclass(frozen=True, slots=True)
class Finding:
    check: str
    subject: str
    tokens: int
    message: str
    found_unix_s: int


@dataclass(frozen=True, slots=True)
class Writer:
    """A gateway or runtime process that has not ended."""

    kind: str
    name: str
    seen_unix_s: float
    late: bool


@dataclass(frozen=True, slots=True)
class Health:
    findings: int
    unreconciled_tokens: int
    writers: int
    late: int
    waiting_hours: int
    """Hours whose sums are older than their facts."""
    oldest_waiting_unix_s: int | None

    @property
    def ok(self) -> bool:
        return self.findings == 0 and self.late == 0

    def lag_s(self, now_unix_s: float) -> float:
        """How long the oldest hour has waited to be summed, counted from its end; 0 if none is complete and waits."""
        if self.oldest_waiting_unix_s is None:
            return 0.0
        return max(0.0, now_unix_s - self.oldest_waiting_unix_s - HOUR)


def health(connection: Connection, now_unix_s: float) -> Health:
    found = connection.execute(select(func.count(), func.coalesce(func.sum(func.abs(finding.c.tokens)), 0))).one()
    waiting = connection.execute(select(func.count(), func.min(dirty_hour.c.hour_unix_s)).select_from(dirty_hour)).one()
    listed = writers(connection, now_unix_s)
    return Health(found[0], int(found[1]), len(listed), sum(item.late for item in listed), waiting[0], waiting[1])


def findings(connection: Connection, limit: int = 200) -> list[Finding]:
    """Where the reconciliation does not add up, the largest differences first."""
    query = select(finding).order_by(func.abs(finding.c.tokens).desc(), finding.c.check, finding.c.subject).limit(limit)
    return [
        Finding(row.check, row.subject, row.tokens, row.message, row.found_unix_s) for row in connection.execute(query)
    ]


def writers(connection: Connection, now_unix_s: float) -> list[Writer]:
    """The processes that still write, those that are silent longest first."""
    found = [
        *(
            (row.gateway, "gateway", row.seen_unix_ms)
            for row in connection.execute(select(gateway).where(~gateway.c.ended))
        ),
        *(
            (f"{row.base}: {row.pod}", "runtime", row.seen_unix_ms)
            for row in connection.execute(select(boot).where(boot.c.ended_unix_ms.is_(None)))
        ),
    ]
    return [
        Writer(kind, name, seen / 1000, now_unix_s - seen / 1000 > LATE_S)
        for name, kind, seen in sorted(found, key=lambda item: (item[2], item[0]))
    ]


def outcomes(connection: Connection, scope: Scope, period: Period) -> dict[str, tuple[int, int, int]]:
    """By outcome: requests, computed tokens and GPU nanoseconds, of whole days."""
    table, start = source_of(connection, scope, period, None, [])
    query = (
        select(
            table.c.outcome,
            func.sum(table.c.requests),
            func.sum(table.c.prompt_tokens - table.c.cached_tokens + table.c.completion_tokens),
            func.sum(table.c.gpu_ns),
        )
        .where(within(table, start, period), scope.where(table))
        .group_by(table.c.outcome)
    )
    return {row[0]: (int(row[1]), int(row[2]), int(row[3])) for row in connection.execute(query)}


def refusals(connection: Connection, scope: Scope, period: Period) -> list[tuple[str, str, int]]:
    """(code, project, requests) that gateways refused, the most frequent first. A project is empty when unknown."""
    table = refusal_minute
    condition = within(table, "minute_unix_s", period)
    if scope.projects is not None:
        condition &= table.c.project.in_(sorted(scope.projects))
    if scope.keys is not None:
        condition &= table.c.key_uid.in_(sorted(scope.keys))
    total = func.sum(table.c["count"]).label("total")
    query = (
        select(table.c.code, table.c.project, total)
        .where(condition)
        .group_by(table.c.code, table.c.project)
        .order_by(total.desc(), table.c.code, table.c.project)
        .limit(100)
    )
    return [(row[0], row[1], int(row[2])) for row in connection.execute(query)]


@dataclass(frozen=True, slots=True)
class ColdStarts:
    requests: int
    waited: int
    mean_ms: float
    worst_ms: int


def cold_starts(connection: Connection, period: Period) -> ColdStarts:
    """How many of the period's requests waited for their adapter or base, and for how long."""
    closed = attempt_closed.c
    cold = closed.cold_ms
    row = connection.execute(
        select(
            func.count(),
            func.count(cold),
            func.coalesce(func.avg(cold), 0),
            func.coalesce(func.max(cold), 0),
        ).where(closed.closed_unix_ms >= period.start_unix_s * 1000, closed.closed_unix_ms < period.end_unix_s * 1000)
    ).one()
    return ColdStarts(row[0], row[1], float(row[2]), row[3])


@dataclass(frozen=True, slots=True)
class Load:
    """An event of an adapter's life on the device of a pod."""

    at_unix_s: float
    type: str
    pod: str
    base: str
    digest: str
    device_bytes: int
    took_s: float
    reason: str


def life(connection: Connection, model: str, uids: Collection[str], limit: int = 100) -> list[Load]:
    """The latest loads, unloads and failures of an adapter, newest first."""
    event = residency.c
    query = (
        select(residency, boot.c.pod, boot.c.base)
        .join(boot, boot.c.id == event.boot)
        .where(event.uid.in_(sorted(uids)), event.model == model)
        .order_by(event.at_unix_ms.desc())
        .limit(limit)
    )
    return [
        Load(
            row.at_unix_ms / 1000,
            row.type,
            row.pod,
            row.base,
            row.digest,
            row.device_bytes,
            row.took_ns / 1e9,
            row.reason,
        )
        for row in connection.execute(query)
    ]


def key_names(connection: Connection, uids: Collection[str]) -> dict[str, str]:
    """The names of the Secrets of these keys, also of those that were deleted. At most some thousands at once."""
    if not uids:
        return {}
    query = select(api_key.c.key_uid, api_key.c.key).where(api_key.c.key_uid.in_(sorted(uids)))
    return {row[0]: row[1] for row in connection.execute(query)}
