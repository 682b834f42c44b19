"""One batch of a gateway, in one transaction: its facts, the cursor of its process, and which sums they make stale."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, insert, select, update

from lorapool_api.usage_protocol import ClosedRecord, GatewayBatch, GatewayRecord, OpenedRecord, RefusalsRecord
from lorapool_ledger.intake import values
from lorapool_ledger.store.tables import (
    api_key,
    attempt_closed,
    attempt_opened,
    gateway,
    refusal_minute,
    runtime_request,
)
from lorapool_ledger.store.writes import HOUR_MS, chunks, insert_into, insert_new, mark_dirty, report

CHECK_GAP = "gap"
"""Findings about records that never arrived. They stay, since what they lack stays away."""
CHECK_TWICE = "twice"
"""Findings about an attempt that two records claim."""
CHECK_CLOCK = "clock"
"""Findings about a writer whose times cannot be right."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a batch."""

    through: int
    """Number of the last record of the process that is committed."""
    conflict: bool = False
    """The batch begins after the next number, and nothing of it was committed."""
    new: int = 0
    """Records that were not known."""
    gaps: list[str] = field(default_factory=list)
    """One sentence for each hole in the numbers that was accepted as lost."""


class DisorderError(ValueError):
    """The records of a batch are not in order."""


def take(connection: Connection, batch: GatewayBatch, now_s: int) -> Taken:
    """Commits what is new of a batch, with times of the ledger's clock `now_s`. Raises DisorderError."""
    numbers = [record.seq for record in batch.records]
    in_order = all(earlier < later for earlier, later in itertools.pairwise(numbers))
    if not in_order or min(numbers, default=1) < 1 or max(numbers, default=1) > values.MOST_SEQ:
        raise DisorderError(
            f"The records of a batch must be numbered upwards from 1 or more to {values.MOST_SEQ}. Send them in order."
        )
    writer, cursor = _writer(connection, batch)
    own_ms = now_s * 1000
    error_ms = values.clock_error_ms(batch.now_unix_ms, own_ms)
    sent = [record for record in batch.records if record.seq > cursor]
    new = [values.on_ledgers_clock(record, error_ms, 0, own_ms) for record in sent]
    if error_ms or any(one is not other for one, other in zip(new, sent, strict=True)):
        text = clock_text(f"gateway process {batch.boot_id} ({batch.gateway})", error_ms)
        report(connection, CHECK_CLOCK, f"gateway/{batch.boot_id}", text, now_s)
    gaps = []
    expected = cursor + 1
    for record in new:
        if record.seq != expected:
            if batch.lost_before < record.seq:
                return Taken(cursor, conflict=True)
            gaps.append(f"records {expected} to {record.seq - 1} of gateway process {batch.boot_id} are lost")
            subject = f"gateway/{batch.boot_id}/{expected}"
            report(connection, CHECK_GAP, subject, f"{gaps[-1]} ({batch.gateway}): its journal was damaged", now_s)
        expected = record.seq + 1
    _insert(connection, writer, new, now_s)
    through = max(cursor, expected - 1)
    changed: dict[str, Any] = {"cursor_seq": through, "seen_unix_ms": values.time_ms(batch.now_unix_ms - error_ms)}
    connection.execute(
        update(gateway).where(gateway.c.id == writer).values(**changed, **({"ended": True} if batch.ended else {}))
    )
    return Taken(through, new=len(new), gaps=gaps)


def clock_text(who: str, error_ms: int) -> str:
    """What a finding says of a writer whose clock is this much ahead, or whose records have times that cannot be."""
    if not error_ms:
        return f"{who} has records of the future or from before its start: the time of reception was taken"
    side = "ahead of" if error_ms > 0 else "behind"
    return f"the clock of {who} is {abs(error_ms) // 1000} s {side} the ledger's: its times are corrected by as much"


def _writer(connection: Connection, batch: GatewayBatch) -> tuple[int, int]:
    """The row of the gateway's process, locked until the end of the transaction, and its cursor."""
    found = select(gateway.c.id, gateway.c.cursor_seq).where(gateway.c.boot_id == batch.boot_id).with_for_update()
    row = connection.execute(found).one_or_none()
    if row is None:
        new = {"boot_id": batch.boot_id, "gateway": values.text(batch.gateway, 253), "cursor_seq": 0}
        new["seen_unix_ms"] = values.time_ms(batch.now_unix_ms)
        connection.execute(insert_into(connection, gateway).values(**new, ended=False).on_conflict_do_nothing())
        row = connection.execute(found).one()
    return int(row.id), int(row.cursor_seq)


def _insert(connection: Connection, writer: int, records: Sequence[GatewayRecord], now_s: int) -> None:
    opened, opened_twice = _by_attempt(_opened(writer, one) for one in records if isinstance(one, OpenedRecord))
    closed, closed_twice = _by_attempt(_closed(writer, one) for one in records if isinstance(one, ClosedRecord))
    refusals = [_refusals(writer, one) for one in records if isinstance(one, RefusalsRecord)]
    for table, rows, kind, twice in (
        (attempt_opened, opened, "opened", opened_twice),
        (attempt_closed, closed, "closed", closed_twice),
    ):
        known = _known(connection, table, list(rows))
        for attempt in sorted(known | twice):
            message = f"attempt {attempt} was {kind} by two records; the first one counts"
            report(connection, CHECK_TWICE, f"{kind}/{attempt}", message, now_s)
        if fresh := [row for attempt, row in rows.items() if attempt not in known]:
            connection.execute(insert(table), fresh)
    if refusals:
        connection.execute(insert(refusal_minute), refusals)
    keys = {row["key_uid"]: {name: row[name] for name in ("key_uid", "key", "owner")} for row in opened.values()}
    insert_new(connection, api_key, list(keys.values()))
    dirty = {int(row["closed_unix_ms"]) // HOUR_MS * HOUR_MS for row in closed.values()}
    for part in chunks(sorted(opened.keys() | closed.keys())):  # the opened record decides which runtime's counts
        ended = select(runtime_request.c.ended_unix_ms).where(runtime_request.c.attempt.in_(part))
        dirty.update(time_ms // HOUR_MS * HOUR_MS for time_ms in connection.execute(ended).scalars())
    mark_dirty(connection, dirty)


def _by_attempt(rows: Iterable[dict[str, Any]]) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """The first row of each attempt, and the attempts of which there are more."""
    found: dict[str, dict[str, Any]] = {}
    twice: set[str] = set()
    for row in rows:
        if found.setdefault(row["attempt"], row) is not row:
            twice.add(row["attempt"])
    return found, twice


def _known(connection: Connection, table: Any, attempts: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for part in chunks(attempts):
        found.update(connection.execute(select(table.c.attempt).where(table.c.attempt.in_(part))).scalars())
    return found


def _opened(writer: int, one: OpenedRecord) -> dict[str, Any]:
    row: dict[str, Any] = {name: values.text(value, 10_000) for name, value in one if isinstance(value, str)}
    del row["kind"]
    times = {"opened_unix_ms": values.time_ms(one.opened_unix_ms)}
    return {"gateway": writer, "seq": one.seq, **row, "stream": one.stream, **times}


def _closed(writer: int, one: ClosedRecord) -> dict[str, Any]:
    prompt = values.tokens(one.prompt_tokens)
    return {
        "gateway": writer,
        "seq": one.seq,
        "attempt": values.text(one.attempt, 128),
        "outcome": one.outcome.value,
        "code": max(0, min(one.code, 999)),
        "prompt_tokens": prompt,
        "cached_tokens": None if one.cached_tokens is None else min(values.tokens(one.cached_tokens), prompt or 0),
        "completion_tokens": values.tokens(one.completion_tokens),
        "cold_ms": None if one.cold_ms is None else min(one.cold_ms, values.MOST_TOKENS),
        "closed_unix_ms": values.time_ms(one.closed_unix_ms),
    }


def _refusals(writer: int, one: RefusalsRecord) -> dict[str, Any]:
    return {
        "gateway": writer,
        "seq": one.seq,
        "minute_unix_s": values.time_ms(one.minute_unix_s * 1000) // 1000,
        "key_uid": values.text(one.key_uid, 64),
        "project": values.text(one.project, 63),
        "code": values.text(one.code, 64),
        "count": values.tokens(one.count),
    }
