"""Deletes the facts of hours that are older than their retention. Sums, invoices and corrections stay.

Whole hours are deleted, oldest first, in small transactions. An hour with a finding, or whose sums are not made, stops
the deletion: what is not reconciled is kept. The same statements serve both databases; decision 69 says why PostgreSQL
has no partitions.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy import Connection, delete, func, select
from sqlalchemy.exc import DBAPIError

from lorapool_ledger.intake.runtime_page import GONE
from lorapool_ledger.store.database import Database, LedgerDatabaseError
from lorapool_ledger.store.tables import (
    attempt_closed,
    attempt_opened,
    boot,
    checkpoint,
    dirty_hour,
    finding,
    mark,
    minute_line,
    pod_minute,
    refusal_minute,
    residency,
    runtime_request,
)
from lorapool_ledger.store.writes import HOUR_S, set_mark
from lorapool_ledger.sums.rollups import DAY_S, FACTS_FROM

log = logging.getLogger("lorapool_ledger")

INTERVAL_S = 600.0
PAUSE_S = 0.2
"""Between two hours, so that intake is not delayed."""
STICKY = ("clock", "gap", "twice", "late")
"""Findings that are kept as long as facts."""

_BY_TIME = (
    (runtime_request, runtime_request.c.ended_unix_ms, 1000),
    (attempt_opened, attempt_opened.c.opened_unix_ms, 1000),
    (attempt_closed, attempt_closed.c.closed_unix_ms, 1000),
    (residency, residency.c.at_unix_ms, 1000),
    (minute_line, minute_line.c.minute_unix_s, 1),
    (pod_minute, pod_minute.c.minute_unix_s, 1),
    (refusal_minute, refusal_minute.c.minute_unix_s, 1),
)


_R1_SUBJECTS = select(finding.c.subject).where(finding.c.check == "R1")


class Retention:
    def __init__(self, database: Database, keep_days: int, *, now_s: Callable[[], float] = time.time) -> None:
        self._database = database
        self._keep_days = keep_days
        self._now_s = now_s

    async def run(self) -> None:
        """Deletes until cancelled."""
        while True:
            try:
                if count := await self.delete_old(PAUSE_S):
                    log.info("deleted the facts of %d hours after their retention", count)
            except (LedgerDatabaseError, DBAPIError) as error:
                log.warning("old facts were not deleted; tried again", extra={"error": str(error)[:300]})
            await asyncio.sleep(INTERVAL_S)

    async def delete_old(self, pause_s: float = 0.0) -> int:
        """Deletes all hours that may go. Returns how many it deleted."""
        before_s = int(self._now_s()) // HOUR_S * HOUR_S - self._keep_days * DAY_S
        count = 0
        while await self._database.write(lambda connection: delete_next(connection, before_s)):
            count += 1
            await asyncio.sleep(pause_s)
        return count


def delete_next(connection: Connection, before_s: int) -> bool:
    """Deletes the facts of the oldest hour that ends by `before_s`. False when none may go."""
    hour_s = _oldest(connection)
    if hour_s is None or hour_s + HOUR_S > before_s or _is_open(connection, hour_s):
        return False
    end_s = hour_s + HOUR_S
    seqs = select(runtime_request.c.boot, func.max(runtime_request.c.seq)).where(
        runtime_request.c.ended_unix_ms < end_s * 1000
    )
    for boot_id, seq in connection.execute(seqs.group_by(runtime_request.c.boot)).all():
        # the last checkpoint of each account stays: the check of later records starts from it
        newer = checkpoint.alias()
        superseded = (
            select(newer.c.seq)
            .where(newer.c.boot == boot_id, newer.c.uid == checkpoint.c.uid, newer.c.seq > checkpoint.c.seq)
            .where(newer.c.seq <= seq)
            .exists()
        )
        connection.execute(delete(checkpoint).where(checkpoint.c.boot == boot_id, checkpoint.c.seq < seq, superseded))
    for table, column, unit in _BY_TIME:
        connection.execute(delete(table).where(column < end_s * unit))
    connection.execute(delete(finding).where(finding.c.check.in_(STICKY), finding.c.found_unix_s < end_s))
    set_mark(connection, FACTS_FROM, end_s)
    return True


def _oldest(connection: Connection) -> int | None:
    known = connection.execute(select(mark.c.value).where(mark.c.name == FACTS_FROM)).scalar()
    found = [connection.execute(select(func.min(column))).scalar() for _, column, _ in _BY_TIME]
    times = [value // unit for value, (_, _, unit) in zip(found, _BY_TIME, strict=True) if value is not None]
    if not times:
        return None
    oldest = min(times) // HOUR_S * HOUR_S
    return int(oldest if known is None else max(oldest, known))


def _is_open(connection: Connection, hour_s: int) -> bool:
    """Whether sums of the hour or an earlier one are not made, or do not add up."""
    if connection.execute(select(dirty_hour.c.hour_unix_s).where(dirty_hour.c.hour_unix_s <= hour_s).limit(1)).first():
        return True
    for subject in connection.execute(select(finding.c.subject).where(finding.c.check == "R4")).scalars():
        if int(subject.split("/")[0]) <= hour_s:
            return True
    wrong = {subject.split("/")[0] for subject in connection.execute(_R1_SUBJECTS).scalars()}
    unchecked = (
        select(runtime_request.c.seq)
        .join(boot, boot.c.id == runtime_request.c.boot)
        .where(runtime_request.c.ended_unix_ms < (hour_s + HOUR_S) * 1000)
        .where(boot.c.boot_id.in_(wrong) | ((runtime_request.c.seq > boot.c.checked_seq) & (boot.c.end != GONE)))
    )
    if connection.execute(unchecked.limit(1)).first():
        return True
    open_attempts = select(finding.c.subject).where(finding.c.check.in_(("R2", "R5")))
    held = select(attempt_opened.c.attempt).where(
        attempt_opened.c.attempt.in_(open_attempts), attempt_opened.c.opened_unix_ms < (hour_s + HOUR_S) * 1000
    )
    return connection.execute(held.limit(1)).first() is not None
