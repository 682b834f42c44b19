"""One page of a runtime process' records, in one transaction: its facts, its cursor, and which sums they make stale."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update

from lorapool_api.usage_protocol import (
    BootRecord,
    BootState,
    CheckpointRecord,
    EndRecord,
    MinuteRecord,
    RemainderRecord,
    RequestRecord,
    ResidencyRecord,
    RuntimeRecord,
)
from lorapool_ledger.intake import values
from lorapool_ledger.intake.gateway_batch import CHECK_CLOCK, CHECK_GAP, CHECK_TWICE, clock_text
from lorapool_ledger.store.tables import (
    attempt_closed,
    boot,
    checkpoint,
    minute_line,
    pod_minute,
    residency,
    runtime_request,
)
from lorapool_ledger.store.writes import HOUR_MS, chunks, insert_into, mark_dirty, report

MINUTE_NS = 60_000_000_000
STOPPED, KILLED, GONE = "stopped", "killed", "gone"
"""How a runtime process ended: in order, by a signal or a fault, or with its pod or its disk."""
_BOOT_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
UNKNOWN_TAIL_MS = 2 * HOUR_MS
"""Attempts that were running when a process was lost began at most this long before."""


@dataclass(frozen=True, slots=True)
class Pod:
    """Whose records these are, from the objects of the cluster."""

    uid: str
    name: str
    base_uid: str
    base: str
    """namespace/name"""
    profile: str = ""


class PageError(ValueError):
    """A page is not of the protocol, or of a process of another pod."""


@dataclass(frozen=True, slots=True)
class PageTaken:
    cursor: int
    """Committed up to here."""
    new: int
    gaps: list[str] = field(default_factory=list)


def cursors(connection: Connection, pod_uid: str) -> dict[str, int]:
    """Up to where the records of the pod's processes are committed."""
    found = select(boot.c.boot_id, boot.c.cursor_seq).where(boot.c.pod_uid == pod_uid)
    return {row.boot_id: row.cursor_seq for row in connection.execute(found)}


def take(
    connection: Connection,
    pod: Pod,
    boot_id: str,
    records: Sequence[RuntimeRecord],
    boots: Sequence[BootState],
    now_unix_ms: int,
    now_s: int,
) -> PageTaken:
    """Commits what is new of a page. `boots` and `now_unix_ms` are the page's, `now_s` is the ledger's clock.

    Times are brought to the ledger's clock: it decides in which hour a request is billed.
    Raises PageError for a page that no runtime of this release writes; nothing of it is committed.
    """
    if any(not 1 <= one.seq <= values.MOST_SEQ for one in records):
        raise PageError(f"the records of process {boot_id[:64]!r} are not numbered from 1 to {values.MOST_SEQ}")
    own_ms = now_s * 1000
    error_ms = values.clock_error_ms(now_unix_ms, own_ms)
    seen_ms = values.time_ms(now_unix_ms - error_ms)
    received = [values.on_ledgers_clock(one, error_ms, 0, own_ms) for one in records]
    row = _row(connection, pod, boot_id, received, seen_ms)
    began_ms = next((one.started_unix_ms for one in received if isinstance(one, BootRecord)), row.started_unix_ms)
    by_number = {one.seq: one for one in reversed(received) if one.seq > row.cursor_seq}
    new = [values.on_ledgers_clock(by_number[seq], 0, began_ms, own_ms) for seq in sorted(by_number)]
    if error_ms or {id(one) for one in new} - {id(one) for one in records}:
        text = clock_text(f"runtime process {boot_id} (pod {pod.name})", error_ms)
        report(connection, CHECK_CLOCK, f"runtime/{boot_id}", text, now_s)
    gaps = [
        f"records {first} to {last} of runtime process {boot_id} never arrived"
        for first, last in holes(row.cursor_seq, new)
    ]
    for text in gaps:
        report(connection, CHECK_GAP, f"runtime/{boot_id}/{text.split()[1]}", f"{text} (pod {pod.name})", now_s)
    _insert(connection, row, new, now_s)
    cursor = max(row.cursor_seq, new[-1].seq) if new else row.cursor_seq
    changed: dict[str, Any] = {"cursor_seq": cursor}
    present = bool(boots) and boots[-1].boot_id == boot_id
    if present:
        changed["seen_unix_ms"] = max(row.seen_unix_ms, seen_ms)
    if row.end == GONE:
        changed |= {"end": "", "ended_unix_ms": None}
    for one in new:
        if isinstance(one, EndRecord):
            changed |= {"end": KILLED if one.killed else STOPPED, "ended_unix_ms": values.time_ms(one.ended_unix_ms)}
            if one.killed:
                mark_tail_dirty(connection, values.time_ms(one.ended_unix_ms), now_s)
        if isinstance(one, BootRecord):
            changed |= _described(one)
    connection.execute(update(boot).where(boot.c.id == row.id).values(**changed))
    _close_forgotten(connection, pod, [state.boot_id for state in boots] or [boot_id], now_s)
    return PageTaken(cursor, len(new), gaps)


def holes(cursor: int, records: Sequence[RuntimeRecord]) -> list[tuple[int, int]]:
    """First and last number of each run that is missing, and is in no remainder. Pure.

    A runtime whose records were not collected for long folds them: requests into remainders, the minutes of an hour
    into one; it leaves out checkpoints between them. Numbers before such a record may be missing for that reason.
    """
    folded_until = max((one.seq for one in records if _is_folded(one)), default=0)
    missing, expected = [], cursor + 1
    for one in records:
        if one.seq > expected and one.seq > folded_until:
            missing.append((max(expected, folded_until + 1), one.seq - 1))
        expected = one.seq + 1
    return [(first, last) for first, last in missing if first <= last]


def _is_folded(record: RuntimeRecord) -> bool:
    return isinstance(record, RemainderRecord) or (isinstance(record, MinuteRecord) and record.uptime_ns > MINUTE_NS)


def close_gone(connection: Connection, boot_ids: Iterable[str], now_s: int) -> int:
    """Ends processes whose pod is gone, at their last sign of life. Returns how many had not ended."""
    count = 0
    for boot_id in boot_ids:
        row = connection.execute(select(boot).where(boot.c.boot_id == boot_id, boot.c.end == "")).one_or_none()
        if row is not None:
            ended_ms = max(row.seen_unix_ms, row.started_unix_ms)
            connection.execute(update(boot).where(boot.c.id == row.id).values(end=GONE, ended_unix_ms=ended_ms))
            mark_tail_dirty(connection, ended_ms, now_s)
            count += 1
    return count


def mark_tail_dirty(connection: Connection, ended_unix_ms: int, now_s: int) -> None:
    """Marks the hours of attempts whose counts are unknown, since their process was lost."""
    last_ms = max(now_s * 1000, ended_unix_ms)
    first_ms = max(ended_unix_ms, last_ms - 48 * HOUR_MS) - UNKNOWN_TAIL_MS
    mark_dirty(connection, range(first_ms, last_ms + HOUR_MS, HOUR_MS))


def _close_forgotten(connection: Connection, pod: Pod, kept: list[str], now_s: int) -> None:
    """Ends processes of the pod of which it keeps nothing any more, such as after its disk was lost."""
    lost = select(boot.c.boot_id).where(boot.c.pod_uid == pod.uid, boot.c.end == "", boot.c.boot_id.not_in(kept))
    close_gone(connection, list(connection.execute(lost).scalars()), now_s)


def _row(connection: Connection, pod: Pod, boot_id: str, records: Sequence[RuntimeRecord], now_ms: int) -> Row[Any]:
    """The row of the process, locked until the end of the transaction. Raises PageError for another pod's process."""
    if not _BOOT_ID.fullmatch(boot_id):
        raise PageError(f"{boot_id[:64]!r} is no identifier of a process")
    found = select(boot).where(boot.c.boot_id == boot_id).with_for_update()
    row = connection.execute(found).one_or_none()
    if row is None:
        new = {
            "boot_id": boot_id,
            "pod_uid": pod.uid,
            "pod": values.text(pod.name, 253),
            "base_uid": pod.base_uid,
            "base": pod.base,
            "profile": values.text(pod.profile, 253),
            "started_unix_ms": min((now_ms, *(_time_ms(one) for one in records))),
            "seen_unix_ms": 0,
        }
        connection.execute(insert_into(connection, boot).values(**new).on_conflict_do_nothing())
        row = connection.execute(found).one()
    if row.pod_uid != pod.uid:
        raise PageError(f"process {boot_id} is of pod {row.pod_uid}, and pod {pod.uid} has records of it")
    return row


def _time_ms(one: RuntimeRecord) -> int:
    match one:
        case BootRecord() | RequestRecord():
            return values.time_ms(one.started_unix_ms)
        case MinuteRecord():
            return values.time_ms(one.minute_unix_s * 1000)
        case RemainderRecord():
            return values.time_ms(one.hour_unix_s * 1000)
        case ResidencyRecord():
            return values.time_ms(one.at_unix_ms)
        case EndRecord():
            return values.time_ms(one.ended_unix_ms)
        case CheckpointRecord():
            return values.MOST_TIME_MS


def _described(one: BootRecord) -> dict[str, Any]:
    return {
        "started_unix_ms": values.time_ms(one.started_unix_ms),
        "device": values.text(one.device, 128),
        "slots": max(0, min(one.slots, 2**31 - 1)),
        "slot_bytes": values.ns(one.slot_bytes),
        "device_bytes": values.ns(one.device_bytes),
    }


def _insert(connection: Connection, row: Row[Any], records: Sequence[RuntimeRecord], now_s: int) -> None:
    requests, checkpoints, minutes, lines, events = [], [], [], [], []
    dirty: set[int] = set()
    for one in records:
        key = {"boot": row.id, "seq": one.seq}
        match one:
            case RequestRecord():
                requests.append({**key, **_request(one, row.base)})
            case RemainderRecord():
                requests.append({**key, **_remainder(one, row.base)})
            case CheckpointRecord():
                uid = values.text(one.uid, 64)
                checkpoints.append({**key, "uid": uid, **_totals(one)})
            case MinuteRecord():
                minute_s = values.time_ms(one.minute_unix_s * 1000) // 1000
                at = {**key, "minute_unix_s": minute_s}
                minutes.append({**at, "uptime_ns": values.ns(one.uptime_ns), "busy_ns": values.ns(one.busy_ns)})
                for uid, line in {values.text(line.uid, 64): line for line in one.lines}.items():
                    model = values.text(line.model, 320) or row.base
                    used = {"gpu_ns": values.ns(line.gpu_ns), "byte_ns": str(min(line.byte_ns, 10**39))}
                    lines.append({**at, "uid": uid, "model": model, **used})
                dirty.add(minute_s * 1000)
            case ResidencyRecord():
                events.append({**key, **_residency(one)})
            case BootRecord() | EndRecord():
                pass
    attempts = [str(one["attempt"]) for one in requests if one["attempt"]]
    dirty.update(_claimed(connection, row, attempts, now_s))
    for table, rows in (
        (runtime_request, requests),
        (checkpoint, checkpoints),
        (pod_minute, minutes),
        (minute_line, lines),
        (residency, events),
    ):
        if rows:
            connection.execute(insert(table), rows)
    dirty.update(int(one["ended_unix_ms"]) // HOUR_MS * HOUR_MS for one in requests)
    for part in chunks(attempts):
        closed = select(attempt_closed.c.closed_unix_ms).where(attempt_closed.c.attempt.in_(part))
        dirty.update(time_ms // HOUR_MS * HOUR_MS for time_ms in connection.execute(closed).scalars())
    mark_dirty(connection, dirty)


def _claimed(connection: Connection, row: Row[Any], attempts: Sequence[str], now_s: int) -> set[int]:
    """Reports those of these attempts that have another record, and returns the times of those: one of them counts."""
    subjects = {attempt for attempt, count in Counter(attempts).items() if count > 1}
    times: set[int] = set()
    half = runtime_request.c
    for part in chunks(attempts):
        for attempt, ended_ms in connection.execute(
            select(half.attempt, half.ended_unix_ms).where(half.attempt.in_(part))
        ):
            subjects.add(attempt)
            times.add(ended_ms)
    for attempt in sorted(subjects):
        message = f"attempt {attempt} has a second record, of runtime process {row.boot_id} (pod {row.pod}); one counts"
        report(connection, CHECK_TWICE, f"runtime/{attempt}", message, now_s)
    return times


def _tokens(one: RequestRecord | RemainderRecord) -> dict[str, int]:
    prompt = values.tokens(one.prompt_tokens)
    return {
        "prompt_tokens": prompt,
        "cached_tokens": min(values.tokens(one.cached_tokens), prompt),
        "completion_tokens": values.tokens(one.completion_tokens),
        "gpu_ns": min(one.gpu_ns, values.MOST_REQUEST_NS),
    }


def _totals(one: CheckpointRecord) -> dict[str, int]:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "gpu_ns")
    return {name: min(getattr(one, name), values.MOST_TOTAL) for name in names}


def _request(one: RequestRecord, base: str) -> dict[str, Any]:
    return {
        "first_seq": one.seq,
        "requests": 1,
        "attempt": values.text(one.attempt, 128),
        "request_id": values.text(one.request_id, 128),
        "key_uid": values.text(one.key_uid, 64),
        "project": values.text(one.project, 63),
        "uid": values.text(one.uid, 64),
        "digest": values.text(one.digest, 128),
        "model": values.text(one.model, 320) or base,
        "sequences": min(one.sequences, 2**31 - 1),
        "outcome": one.outcome.value,
        "started_unix_ms": values.time_ms(one.started_unix_ms),
        "ended_unix_ms": values.time_ms(one.ended_unix_ms),
        **_tokens(one),
    }


def _remainder(one: RemainderRecord, base: str) -> dict[str, Any]:
    hour_ms = values.time_ms(one.hour_unix_s * 1000)
    return {
        "first_seq": max(1, min(one.first_seq, one.seq)),
        "requests": values.tokens(one.requests),
        "attempt": "",
        "request_id": "",
        "key_uid": values.text(one.key_uid, 64),
        "project": values.text(one.project, 63),
        "uid": values.text(one.uid, 64),
        "digest": "",
        "model": values.text(one.model, 320) or base,
        "sequences": 1,
        "outcome": one.outcome.value,
        "started_unix_ms": hour_ms,
        "ended_unix_ms": hour_ms,
        **_tokens(one),
    }


def _residency(one: ResidencyRecord) -> dict[str, Any]:
    return {
        "type": one.type.value,
        "uid": values.text(one.uid, 64),
        "digest": values.text(one.digest, 128),
        "model": values.text(one.model, 320),
        "at_unix_ms": values.time_ms(one.at_unix_ms),
        "device_bytes": max(-values.MOST_NS, min(one.device_bytes, values.MOST_NS)),
        "took_ns": values.ns(one.took_ns),
        "reason": values.text(one.reason, 64),
    }
