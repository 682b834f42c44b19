"""R1 and R3: what a runtime process recorded one by one against what it counted apart from that."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, func, select

from lorapool_ledger.intake.runtime_page import GONE, KILLED, STOPPED
from lorapool_ledger.store.tables import boot, checkpoint, minute_line, pod_minute, runtime_request
from lorapool_ledger.store.writes import HOUR_MS
from lorapool_ledger.sums.findings import Finding, differences, distance

COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "gpu_ns")
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens")
MOST_ROWS = 200_000
"""Records of one process that one run looks at; the next run goes on."""
CLOCK_NS = 10_000_000
"""Start and end of a process are whole milliseconds of a clock that is corrected while it runs, by CLOCK_SHARE."""
CLOCK_SHARE = 1000
RECENT_MS = 48 * HOUR_MS


def check_checkpoints(connection: Connection, now_s: int) -> tuple[list[Finding], dict[int, int]]:
    """R1. Returns the findings and, by boot, the record up to which everything is in order.

    That is always one at which no account has records behind its last checkpoint, so that the next run can start there
    from the checkpoints alone. It stays before the first difference.
    """
    findings: list[Finding] = []
    checked: dict[int, int] = {}
    lives = boot.c.ended_unix_ms.is_(None) | (boot.c.ended_unix_ms > now_s * 1000 - RECENT_MS) | (boot.c.end != GONE)
    for row in connection.execute(select(boot).where(boot.c.cursor_seq > boot.c.checked_seq, lives)).all():
        found, seq = _check_boot(connection, row)
        findings += found
        if seq > row.checked_seq:
            checked[row.id] = seq
    return findings, checked


def _check_boot(connection: Connection, row: Row[Any]) -> tuple[list[Finding], int]:
    sums = _base(connection, row.id, row.checked_seq)
    pending: set[str] = set()
    findings: dict[str, Finding] = {}
    clean = row.checked_seq
    records, complete = _records(connection, row.id, row.checked_seq)
    for seq, uid, is_checkpoint, counts in records:
        own = sums.setdefault(uid, dict.fromkeys(COUNTS, 0))
        if not is_checkpoint:
            for name in COUNTS:
                own[name] += counts[name]
            pending.add(uid)
            continue
        pending.discard(uid)
        if own != counts:
            subject = f"{row.boot_id}/{uid or 'base'}"
            text = f"process {row.boot_id} of {row.base}, account {uid or 'base'}: records up to {seq} have "
            findings.setdefault(
                subject,
                Finding("R1", subject, max(1, distance(counts, own, TOKENS)), text + differences(counts, own)),
            )
        if not pending and not findings:
            clean = seq
    settled = not pending or row.end == KILLED  # no checkpoint follows the last records of a killed process
    return list(findings.values()), row.cursor_seq if complete and settled and not findings else clean


def _base(connection: Connection, boot_id: int, seq: int) -> dict[str, dict[str, int]]:
    """By account, its last checkpoint up to this record, which covers all its records up to there."""
    if seq == 0:
        return {}
    latest = (
        select(checkpoint.c.uid, func.max(checkpoint.c.seq).label("seq"))
        .where(checkpoint.c.boot == boot_id, checkpoint.c.seq <= seq)
        .group_by(checkpoint.c.uid)
        .subquery()
    )
    found = select(checkpoint).join(latest, latest.c.seq == checkpoint.c.seq).where(checkpoint.c.boot == boot_id)
    return {row["uid"]: {name: int(row[name]) for name in COUNTS} for row in connection.execute(found).mappings()}


def _records(
    connection: Connection, boot_id: int, after: int
) -> tuple[list[tuple[int, str, bool, dict[str, int]]], bool]:
    """Requests and checkpoints of a process in order, and whether these are all."""
    rows: list[tuple[int, str, bool, dict[str, int]]] = []
    last = None
    for table in (runtime_request, checkpoint):
        names = [table.c[name] for name in COUNTS]
        found = (
            select(table.c.seq, table.c.uid, *names)
            .where(table.c.boot == boot_id, table.c.seq > after)
            .order_by(table.c.seq)
            .limit(MOST_ROWS)
        )
        if last is not None:
            found = found.where(table.c.seq <= last)
        part = [
            (row.seq, row.uid, table is checkpoint, {name: int(getattr(row, name)) for name in COUNTS})
            for row in connection.execute(found)
        ]
        rows += part
        last = part[-1][0] if table is runtime_request and len(part) == MOST_ROWS else None
    return sorted(rows, key=lambda row: row[0]), last is None and len(part) < MOST_ROWS


def check_minutes(connection: Connection, earlier: set[str], now_s: int) -> list[Finding]:
    """R3, of processes that live or ended lately, or of which there is a finding."""
    live = (
        (boot.c.ended_unix_ms.is_(None))
        | (boot.c.ended_unix_ms > now_s * 1000 - RECENT_MS)
        | boot.c.boot_id.in_(sorted({subject.partition("/")[0] for subject in earlier}))
    )
    line = (
        select(minute_line.c.boot, minute_line.c.seq, func.sum(minute_line.c.gpu_ns).label("gpu_ns"))
        .join(boot, boot.c.id == minute_line.c.boot)
        .where(live)
        .group_by(minute_line.c.boot, minute_line.c.seq)
        .subquery()
    )
    used = func.coalesce(line.c.gpu_ns, 0)
    wrong = (
        select(boot.c.boot_id, pod_minute.c.minute_unix_s, pod_minute.c.uptime_ns, pod_minute.c.busy_ns, used)
        .join(boot, boot.c.id == pod_minute.c.boot)
        .outerjoin(line, (line.c.boot == pod_minute.c.boot) & (line.c.seq == pod_minute.c.seq))
        .where(live, (used != pod_minute.c.busy_ns) | (pod_minute.c.busy_ns > pod_minute.c.uptime_ns))
    )
    findings = []
    for boot_id, minute_s, uptime, busy, parts in connection.execute(wrong):
        text = f"minute {minute_s} of process {boot_id}: its accounts used {parts} ns of {busy} ns busy, {uptime} ns up"
        differ = abs(int(parts) - busy) + max(0, busy - uptime)
        findings.append(Finding("R3", f"{boot_id}/{minute_s}", max(1, differ), text))
    process = (boot.c.boot_id, boot.c.started_unix_ms, boot.c.ended_unix_ms)
    whole = (
        select(*process, func.coalesce(func.sum(pod_minute.c.uptime_ns), 0).label("uptime"))
        .outerjoin(pod_minute, pod_minute.c.boot == boot.c.id)
        .where(live, boot.c.end == STOPPED)
        .group_by(*process)
    )
    for row in connection.execute(whole):
        life_ns = (row.ended_unix_ms - row.started_unix_ms) * 1_000_000
        if abs(int(row.uptime) - life_ns) > max(CLOCK_NS, life_ns // CLOCK_SHARE):
            text = (
                f"the minutes of process {row.boot_id} have {int(row.uptime)} ns instead of {life_ns} ns, or the clock "
                "was set while it ran"
            )
            findings.append(Finding("R3", f"{row.boot_id}/life", abs(int(row.uptime) - life_ns), text))
    return findings
