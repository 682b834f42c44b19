"""Fills the outbox of a sink from the facts, each attempt once, in the order in which its writer recorded it.

How far it has come is noted for each writer in the transaction that adds the events. An attempt waits for its other
half, which decides how it ended; what is not billed makes no event. A sink begins with what ends after it was listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Row, Table, func, select

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.billing.billed import BILLED, GatewayHalf, Result, RuntimeHalf, result_of
from lorapool_ledger.intake.corrections import correction_of
from lorapool_ledger.sinks.config import Meter, Sink
from lorapool_ledger.sinks.shapes import Event, Usage, correction_event, events_of
from lorapool_ledger.store.tables import (
    attempt_closed,
    attempt_opened,
    boot,
    correction,
    gateway,
    mark,
    outbox,
    runtime_request,
)
from lorapool_ledger.store.writes import insert_new, set_mark
from lorapool_ledger.sums.joined import has_runtime_half, is_counted, is_in_remainder

GATEWAY_GRACE_MS = 15 * 60_000
"""An attempt is sent without its gateway's half when that has not arrived so long after its end."""
RUNTIME_GRACE_MS = 24 * 3600_000
"""And without its runtime's half, unless the runtime has ended: then at once."""
ROWS = 500
"""Attempts of one writer that one transaction takes."""


@dataclass
class _Taken:
    """What a writer's next facts come to."""

    through: int
    usages: list[Usage] = field(default_factory=list)


def feed(connection: Connection, sink: Sink, now_unix_ms: int) -> int:
    """Adds the events of facts that are new, and returns how many facts it went through."""
    since = f"sink/{sink.name}/since"
    marks = _marks(connection, sink)
    if since not in marks:
        set_mark(connection, since, now_unix_ms)
        marks[since] = now_unix_ms
    passed = _corrections(connection, sink, marks, now_unix_ms)
    for kind, table, take in (("b", boot, _of_runtime), ("g", gateway, _of_gateway)):
        for key, cursor in connection.execute(select(table.c.id, table.c.cursor_seq)).all():
            name = f"sink/{sink.name}/{kind}/{key}"
            before = marks.get(name, 0)
            if cursor > before:
                taken = take(
                    connection, key, before, min(cursor, _end(connection, kind, key, before, cursor)), now_unix_ms
                )
                usages = [one for one in taken.usages if one.ended_unix_ms >= marks[since]]
                _store(connection, sink, [event for one in usages for event in events_of(sink, one)], now_unix_ms)
                if taken.through > before:
                    set_mark(connection, name, taken.through)
                    passed += taken.through - before
    return passed


def _marks(connection: Connection, sink: Sink) -> dict[str, int]:
    query = select(mark.c.name, mark.c.value).where(mark.c.name.startswith(f"sink/{sink.name}/"))
    return {row.name: row.value for row in connection.execute(query)}


def _end(connection: Connection, kind: str, key: int, after: int, cursor: int) -> int:
    """The number up to which at most ROWS facts lie."""
    table, writer = (runtime_request, "boot") if kind == "b" else (attempt_closed, "gateway")
    numbers = select(table.c.seq).where(table.c[writer] == key, table.c.seq > after).order_by(table.c.seq).limit(ROWS)
    found = connection.execute(numbers).scalars().all()
    return found[-1] if len(found) == ROWS else cursor


def _corrections(connection: Connection, sink: Sink, marks: Mapping[str, int], now_unix_ms: int) -> int:
    """Adds those that were recorded since the sink was listed, each with a mark of its own.

    They are few, and a command in a process of its own records them: one may be committed after a later number.
    """
    since_s = marks[f"sink/{sink.name}/since"] // 1000
    passed = 0
    for number in connection.execute(select(correction.c.id).where(correction.c.recorded_unix_s >= since_s)).scalars():
        name = f"sink/{sink.name}/c/{number}"
        if name not in marks:
            row = connection.execute(select(correction).where(correction.c.id == number)).one()
            event = correction_event(sink, correction_of(row), row.key_uid)
            _store(connection, sink, [event] if event else [], now_unix_ms)
            set_mark(connection, name, 1)
            passed += 1
    return passed


def _store(connection: Connection, sink: Sink, events: Iterable[Event], now_unix_ms: int) -> None:
    rows = [
        {
            "sink": sink.name,
            "event_id": event.event_id,
            "body": event.body,
            "next_unix_s": now_unix_ms // 1000,
            "tries": 0,
            "error": "",
        }
        for event in events
    ]
    insert_new(connection, outbox, rows)


def _of_runtime(connection: Connection, key: int, after: int, through: int, now_unix_ms: int) -> _Taken:
    boot_id = connection.execute(select(boot.c.boot_id).where(boot.c.id == key)).scalar_one()
    half = runtime_request
    query = (
        select(half, attempt_closed.c.outcome.label("closed"), *_said(attempt_closed))
        .outerjoin(attempt_closed, attempt_closed.c.attempt == half.c.attempt)
        .where(half.c.boot == key, half.c.seq > after, half.c.seq <= through, is_counted)
        .order_by(half.c.seq)
    )
    taken = _Taken(through)
    for row in connection.execute(query):
        single = bool(row.attempt)
        waits = single and row.key_uid and row.closed is None
        if waits and row.ended_unix_ms + GATEWAY_GRACE_MS > now_unix_ms:
            return _Taken(row.seq - 1, taken.usages)
        runtime = RuntimeHalf(Ended(row.outcome), row.prompt_tokens, row.cached_tokens, row.completion_tokens)
        result = result_of(runtime, _gateway_half(row) if row.closed else None)
        taken.usages += _usage(row.attempt or f"{boot_id}.{row.seq}", row, row.ended_unix_ms, result, row.requests)
    return taken


def _of_gateway(connection: Connection, key: int, after: int, through: int, now_unix_ms: int) -> _Taken:
    """Attempts whose runtime was lost with its records; all others are taken from the runtime's side."""
    closed, opened = attempt_closed, attempt_opened
    query = (
        select(opened, closed.c.seq.label("closed_seq"), closed.c.closed_unix_ms, closed.c.outcome.label("closed"))
        .add_columns(*_said(closed), boot.c.ended_unix_ms.label("boot_ended"))
        .add_columns(has_runtime_half.label("has_half"), is_in_remainder.label("in_remainder"))
        .select_from(closed.join(opened, opened.c.attempt == closed.c.attempt))
        .outerjoin(boot, boot.c.boot_id == opened.c.boot_id)
        .where(closed.c.gateway == key, closed.c.seq > after, closed.c.seq <= through)
        .order_by(closed.c.seq)
    )
    taken = _Taken(through)
    for row in connection.execute(query):
        result = result_of(None, _gateway_half(row))
        if row.has_half or row.in_remainder or result.outcome not in BILLED:
            continue
        if row.boot_ended is None and row.closed_unix_ms + RUNTIME_GRACE_MS > now_unix_ms:
            return _Taken(row.closed_seq - 1, taken.usages)
        taken.usages += _usage(row.attempt, row, row.closed_unix_ms, result, 1)
    return taken


def _said(table: Table) -> list[Any]:
    names = ("prompt_tokens", "cached_tokens", "completion_tokens")
    return [table.c[name].label(f"said_{name}") for name in names]


def _gateway_half(row: Row[Any]) -> GatewayHalf:
    return GatewayHalf(
        AttemptEnd(row.closed), row.said_prompt_tokens, row.said_cached_tokens, row.said_completion_tokens
    )


def _usage(attempt: str, row: Row[Any], ended_unix_ms: int, result: Result, requests: int) -> Iterator[Usage]:
    if result.outcome in BILLED and row.project:
        counts = {
            Meter.PROMPT_TOKENS: result.billed_prompt_tokens,
            Meter.CACHED_TOKENS: result.billed_cached_tokens,
            Meter.COMPLETION_TOKENS: result.billed_completion_tokens,
            Meter.REQUESTS: requests,
        }
        yield Usage(attempt, ended_unix_ms, row.project, row.key_uid, row.model, result.outcome.value, counts)


def waiting(connection: Connection, sink: Sink) -> tuple[int, int]:
    """How many events wait in the outbox, and how many of them the sink has refused."""
    own = outbox.c.sink == sink.name
    count = connection.execute(select(func.count()).where(own)).scalar_one()
    refused = connection.execute(select(func.count()).where(own, outbox.c.error.startswith("refused"))).scalar_one()
    return count, refused
