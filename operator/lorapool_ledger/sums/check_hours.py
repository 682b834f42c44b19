"""R4: sums by hour against the facts, counted without any rule of the bill; sums of spans against those of days."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import ColumnElement, Connection, String, Table, func, select

from lorapool_api.usage_protocol import AttemptEnd
from lorapool_ledger.billing.billed import Billed
from lorapool_ledger.intake.runtime_page import GONE
from lorapool_ledger.store.tables import (
    SPAN_S,
    attempt_closed,
    attempt_opened,
    boot,
    dirty_hour,
    mark,
    model_day,
    model_span,
    pod_day,
    pod_span,
    runtime_request,
    span,
    usage_hour,
)
from lorapool_ledger.store.wide import exact, exact_sums
from lorapool_ledger.store.writes import HOUR_S
from lorapool_ledger.sums.findings import Finding, differences, distance
from lorapool_ledger.sums.joined import GATEWAY_SIDE, closed_alone_in, ended_in
from lorapool_ledger.sums.rollups import FACTS_FROM

RECENT_HOURS = 3
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
TOKENS = COUNTS[1:]
_SUMS = (*COUNTS, "gpu_ns", "billed_prompt_tokens", "billed_cached_tokens", "billed_completion_tokens")
_POD_SUMS = ("uptime_ns", "gpu_ns", "byte_ns")
_Key = tuple[str, str, str]


def check_hours(connection: Connection, next_hour_s: int, earlier: set[str], now_s: int) -> tuple[list[Finding], int]:
    """The last hours, one older hour and one span in turn, and those of earlier findings, and the next older hour.

    Hours whose sums are older than their facts wait until they are made.
    """
    present_s = now_s // HOUR_S * HOUR_S
    hours = {present_s - index * HOUR_S for index in range(RECENT_HOURS)}
    hours |= {int(subject.split("/")[0]) for subject in earlier}
    facts_from = connection.execute(select(mark.c.value).where(mark.c.name == FACTS_FROM)).scalar() or 0
    first = connection.execute(select(func.min(usage_hour.c.hour_unix_s))).scalar() or present_s
    first = max(first, facts_from)
    older_s = next_hour_s if first <= next_hour_s <= present_s else first
    hours.add(older_s)
    dirty = set(connection.execute(select(dirty_hour.c.hour_unix_s)).scalars())
    findings = []
    for hour in sorted(hours - dirty):
        if hour >= facts_from:
            findings += _check(connection, hour)
    made = sorted(connection.execute(select(span.c.day_unix_s)).scalars())
    spans = set(made[older_s // HOUR_S % len(made) :][:1]) if made else set()
    for start in sorted(spans | (hours & set(made))):
        findings += _check_span(connection, start)
    return findings, older_s + HOUR_S


def _check_span(connection: Connection, start_s: int) -> list[Finding]:
    findings = []
    for days, spans, name, sums in ((model_day, model_span, "project", _SUMS), (pod_day, pod_span, "boot", _POD_SUMS)):
        expected, actual = (_by(connection, table, name, sums, start_s) for table in (days, spans))
        for key in sorted(expected.keys() | actual.keys()):
            one, other = (found.get(key, dict.fromkeys(sums, 0)) for found in (expected, actual))
            if text := differences(one, other):
                message = f"sums of the {SPAN_S // 86400} days from {start_s}, {name} {key}: {text}"
                findings.append(Finding("R4", f"{start_s}/{name}/{key}", max(1, distance(one, other, TOKENS)), message))
    return findings


def _by(
    connection: Connection, table: Table, name: str, sums: tuple[str, ...], start_s: int
) -> dict[str, dict[str, int]]:
    of_span = (table.c.day_unix_s >= start_s) & (table.c.day_unix_s < start_s + SPAN_S)
    columns = [part for one in sums for part in _parts(table.c[one])]
    found: dict[str, dict[str, int]] = {}
    for key, *values in connection.execute(select(table.c[name], *columns).where(of_span).group_by(table.c[name])):
        left = iter(values)
        found[str(key)] = {
            one: exact(next(left), next(left)) if isinstance(table.c[one].type, String) else int(next(left))
            for one in sums
        }
    return found


def _parts(column: ColumnElement[Any]) -> tuple[ColumnElement[int], ...]:
    return exact_sums(column) if isinstance(column.type, String) else (func.sum(column),)


def _check(connection: Connection, hour_s: int) -> list[Finding]:
    facts, sums = _facts(connection, hour_s), _sums(connection, hour_s)
    findings = []
    for key in sorted(facts.keys() | sums.keys()):
        expected, actual = facts.get(key, dict.fromkeys(COUNTS, 0)), sums.get(key, dict.fromkeys(COUNTS, 0))
        if text := differences(expected, actual):
            project, key_uid, uid = key
            whose = f"project {project or '-'}, key {key_uid or '-'}, adapter {uid or 'base'}"
            subject = f"{hour_s}/{project}/{key_uid}/{uid}"
            message = f"sums of hour {hour_s}, {whose}: {text}"
            findings.append(Finding("R4", subject, max(1, distance(expected, actual, TOKENS)), message))
    return findings


def _sums(connection: Connection, hour_s: int) -> dict[_Key, dict[str, int]]:
    names = (usage_hour.c.project, usage_hour.c.key_uid, usage_hour.c.uid)
    counts = [func.sum(usage_hour.c[name]) for name in COUNTS]
    found = (
        select(*names, *counts)
        .where(usage_hour.c.hour_unix_s == hour_s, usage_hour.c.outcome != Billed.UNKNOWN.value)
        .group_by(*names)
    )
    return {
        (project, key, uid): dict(zip(COUNTS, map(int, values), strict=True))
        for project, key, uid, *values in connection.execute(found)
    }


def _facts(connection: Connection, hour_s: int) -> dict[_Key, dict[str, int]]:
    facts: dict[_Key, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    half, opened, closed = runtime_request.c, attempt_opened.c, attempt_closed.c
    runtimes = (
        select(half.project, half.key_uid, half.uid, *(func.sum(half[name]) for name in COUNTS))
        .where(ended_in(hour_s, hour_s + HOUR_S))
        .group_by(half.project, half.key_uid, half.uid)
    )
    reported = [func.coalesce(closed[name], 0) for name in TOKENS]
    is_known = (
        closed.prompt_tokens.is_not(None)
        | closed.completion_tokens.is_not(None)
        | (closed.outcome == AttemptEnd.REFUSED.value)
        | func.coalesce(boot.c.end != GONE, True)
    )
    gateways = (
        select(opened.project, opened.key_uid, opened.uid, func.count(), *map(func.sum, reported))
        .select_from(GATEWAY_SIDE)
        .where(closed_alone_in(hour_s, hour_s + HOUR_S), is_known)
        .group_by(opened.project, opened.key_uid, opened.uid)
    )
    for found in (runtimes, gateways):
        for project, key, uid, *values in connection.execute(found):
            kept = facts[project, key, uid]
            for name, value in zip(COUNTS, values, strict=True):
                kept[name] += int(value or 0)
    return facts
