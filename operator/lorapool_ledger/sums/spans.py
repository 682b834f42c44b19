"""Sums of spans of days, made once from the sums of their days, so that reports of a month read few rows."""

from __future__ import annotations

from sqlalchemy import BigInteger, ColumnElement, Connection, Table, cast, delete, func, insert, literal, select

from lorapool_ledger.store.tables import SPAN_S, dirty_hour, model_day, model_span, pod_day, pod_span, span
from lorapool_ledger.store.wide import exact, exact_sums

SETTLED_S = 86400
"""A span is made this long after its end: records of its last hours may still come."""
_ROWS = 500


def missing_spans(connection: Connection, now_s: int) -> list[int]:
    """The spans, by their first days, that are over, have no hour that waits to be summed, and are not made yet."""
    firsts = [connection.execute(select(func.min(table.c.day_unix_s))).scalar() for table in (model_day, pod_day)]
    known = [first for first in firsts if first is not None]
    if not known:
        return []
    starts = range(min(known) // SPAN_S * SPAN_S, now_s - SETTLED_S - SPAN_S + 1, SPAN_S)
    waiting = {hour // SPAN_S * SPAN_S for hour in connection.execute(select(dirty_hour.c.hour_unix_s)).scalars()}
    return sorted(set(starts) - waiting - set(connection.execute(select(span.c.day_unix_s)).scalars()))


def make_span(connection: Connection, start_s: int) -> None:
    """Makes the sums of the span that begins here from those of its days."""
    for table in (model_span, pod_span):
        connection.execute(delete(table).where(table.c.day_unix_s == start_s))
    keys = [model_day.c[name] for name in ("project", "base", "uid", "model", "outcome")]
    columns = [column.name for column in model_span.c]
    sums = [cast(func.sum(model_day.c[name]), BigInteger) for name in columns[1 + len(keys) :]]
    of_models = select(literal(start_s, BigInteger), *keys, *sums).where(_in_span(model_day, start_s)).group_by(*keys)
    connection.execute(insert(model_span).from_select(columns, of_models))
    account = (pod_day.c.boot, pod_day.c.uid)
    counts = (func.max(pod_day.c.model), func.sum(pod_day.c.uptime_ns), func.sum(pod_day.c.gpu_ns))
    of_pods = select(*account, *counts, *exact_sums(pod_day.c.byte_ns)).where(_in_span(pod_day, start_s))
    rows = [
        {
            "day_unix_s": start_s, "boot": boot, "uid": uid, "model": model, "uptime_ns": int(uptime_ns),
            "gpu_ns": int(gpu_ns), "byte_ns": str(exact(high, low)),
        }
        for boot, uid, model, uptime_ns, gpu_ns, high, low in connection.execute(of_pods.group_by(*account))
    ]  # fmt: skip
    for first in range(0, len(rows), _ROWS):
        connection.execute(insert(pod_span), rows[first : first + _ROWS])
    connection.execute(insert(span).values(day_unix_s=start_s))


def _in_span(table: Table, start_s: int) -> ColumnElement[bool]:
    return (table.c.day_unix_s >= start_s) & (table.c.day_unix_s < start_s + SPAN_S)
