"""The reconciliation: five checks that compare what was counted twice, in whole numbers, again and again.

    R1  of each runtime process and account, the records up to a checkpoint add up to the checkpoint
    R2  every attempt that was sent has a runtime's half of the same key, project and adapter, or a proof why none
    R3  the parts of each minute add up to its busy time, and the minutes of a process to its life
    R4  the sums by hour are those of the facts
    R5  no more tokens were delivered than were computed

A run reads in one transaction, so that it sees one state, and replaces the findings of these checks. Each check goes on
from where it has found everything in order, and looks at its findings again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.exc import DBAPIError

from lorapool_ledger.billing.billed import Billed
from lorapool_ledger.metrics import CHECKS, Metrics
from lorapool_ledger.store.database import Database, LedgerDatabaseError
from lorapool_ledger.store.tables import boot, finding, mark, usage_hour
from lorapool_ledger.store.writes import mark_dirty, report, set_mark
from lorapool_ledger.sums.check_attempts import Attempts, check_attempts
from lorapool_ledger.sums.check_hours import check_hours
from lorapool_ledger.sums.check_runtimes import check_checkpoints, check_minutes
from lorapool_ledger.sums.findings import Finding

log = logging.getLogger("lorapool_ledger")

INTERVAL_S = 60.0
SHARE = 10
"""The next run waits for at least this many times the duration of the last one."""
MARK_ATTEMPTS, MARK_HOUR = "R2 attempts", "R4 hour"
DAY_S = 86_400


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has found. Nothing of it is written yet."""

    findings: list[Finding]
    checked_seqs: dict[int, int] = field(default_factory=dict)
    """Of boots, up to where R1 is in order."""
    attempts: Attempts = field(default_factory=Attempts)
    next_hour_s: int = 0
    """The older hour that R4 looks at in the next run."""
    unknown_attempts: int = 0

    @property
    def tokens(self) -> Mapping[str, int]:
        """By check, how many tokens are not reconciled."""
        counted: Counter[str] = Counter()
        for one in self.findings:
            counted[one.check] += one.tokens
        return counted


def examine(connection: Connection, now_s: int) -> Outcome:
    """Runs all checks. Changes nothing."""
    marks = {row.name: row.value for row in connection.execute(select(mark))}
    earlier = _earlier(connection)
    found, checked_seqs = check_checkpoints(connection, now_s)
    attempts = check_attempts(connection, marks.get(MARK_ATTEMPTS, 0), earlier["R2"] | earlier["R5"], now_s)
    hours, next_hour_s = check_hours(connection, marks.get(MARK_HOUR, 0), earlier["R4"], now_s)
    findings = [*found, *attempts.findings, *check_minutes(connection, earlier["R3"], now_s), *hours]
    unknown = select(func.sum(usage_hour.c.requests)).where(
        usage_hour.c.outcome == Billed.UNKNOWN.value, usage_hour.c.hour_unix_s >= now_s - DAY_S
    )
    return Outcome(findings, checked_seqs, attempts, next_hour_s, int(connection.execute(unknown).scalar() or 0))


def _earlier(connection: Connection) -> dict[str, set[str]]:
    earlier: dict[str, set[str]] = {check: set() for check in CHECKS}
    for row in connection.execute(select(finding.c.check, finding.c.subject).where(finding.c.check.in_(CHECKS))):
        earlier[row.check].add(row.subject)
    return earlier


def record(connection: Connection, outcome: Outcome, now_s: int) -> dict[str, int]:
    """Replaces the findings of the checks, and notes how far they have come. Returns the number of all findings."""
    kept = {(one.check, one.subject) for one in outcome.findings}
    for row in connection.execute(select(finding.c.check, finding.c.subject).where(finding.c.check.in_(CHECKS))).all():
        if (row.check, row.subject) not in kept:
            one = (finding.c.check == row.check) & (finding.c.subject == row.subject)
            connection.execute(delete(finding).where(one))
    for one_found in outcome.findings:
        report(connection, one_found.check, one_found.subject, one_found.message, now_s, one_found.tokens)
    for boot_id, seq in outcome.checked_seqs.items():
        connection.execute(update(boot).where(boot.c.id == boot_id).values(checked_seq=seq))
    set_mark(connection, MARK_ATTEMPTS, outcome.attempts.checked_until_ms)
    set_mark(connection, MARK_HOUR, outcome.next_hour_s)
    mark_dirty(connection, outcome.attempts.unknown_opened_ms)
    counts = select(finding.c.check, func.count()).group_by(finding.c.check)
    return {row[0]: row[1] for row in connection.execute(counts)}


class Reconciler:
    def __init__(self, database: Database, metrics: Metrics, *, now_s: Callable[[], float] = time.time) -> None:
        self._database = database
        self._metrics = metrics
        self._now_s = now_s

    async def run(self) -> None:
        """Checks until cancelled."""
        while True:
            began_s = time.monotonic()
            try:
                await self.reconcile()
            except (LedgerDatabaseError, DBAPIError) as error:
                log.warning("the reconciliation was not made; tried again", extra={"error": str(error)[:300]})
            await asyncio.sleep(max(INTERVAL_S, SHARE * (time.monotonic() - began_s)))

    async def reconcile(self) -> list[Finding]:
        """Runs the checks once and records their findings."""
        now_s = int(self._now_s())
        outcome = await self._database.read(lambda connection: examine(connection, now_s))
        counts = await self._database.write(lambda connection: record(connection, outcome, now_s))
        self._metrics.reconciled(outcome.tokens, counts, outcome.unknown_attempts, self._now_s())
        for check, number in sorted(_numbers(outcome.findings).items()):
            log.error("the bill does not add up", extra={"error": f"{check}: {number} findings"})
        return outcome.findings


def _numbers(findings: Iterable[Finding]) -> Counter[str]:
    return Counter(one.check for one in findings)
