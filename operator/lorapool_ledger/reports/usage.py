"""Sums of usage by bucket and group. Days and hours are read from the sums, minutes from the facts.

Usage is what is billed: the tokens of completed requests and of those that their client left. What the platform failed
to deliver is waste, which `outcomes` reports apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice, pairwise
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, and_, func, literal, select, union_all
from sqlalchemy.sql.selectable import FromClause

from lorapool_ledger.billing.billed import BILLED
from lorapool_ledger.reports.minutes import START, minutes
from lorapool_ledger.reports.periods import Period, Width
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.store.tables import SPAN_S, model_day, model_span, span, usage_day, usage_hour


class By(StrEnum):
    """What usage may be grouped by: columns of the sums."""

    PROJECT = "project"
    KEY = "key_uid"
    BASE = "base"
    MODEL = "model"
    OUTCOME = "outcome"


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The usage of one group in one bucket. Counts are tokens and requests."""

    start_unix_s: int
    group: tuple[str, ...]
    """The values of the columns that the usage is grouped by, in their order."""
    requests: int
    prompt_tokens: int
    """Billed at the full price: without the cached ones."""
    cached_tokens: int
    completion_tokens: int

    @property
    def input_tokens(self) -> int:
        """Prompt tokens, cached ones included."""
        return self.prompt_tokens + self.cached_tokens


def usage(
    connection: Connection, scope: Scope, period: Period, width: Width | None, by: Sequence[By] = ()
) -> list[UsageRow]:
    """Billed usage by bucket and group, in order. Buckets and groups without usage have no row.

    `width` None: the whole period is one bucket. The period's ends are whole days then, or whole hours.
    """
    table, start = source_of(connection, scope, period, width, by)
    columns = [table.c[name.value] for name in by]
    bucket: ColumnElement[int] = literal(period.start_unix_s) if width is None else table.c[start]
    query: Select[Any] = (
        select(
            bucket.label("bucket"),
            *columns,
            func.sum(table.c.requests),
            func.sum(table.c.billed_prompt_tokens),
            func.sum(table.c.billed_cached_tokens),
            func.sum(table.c.billed_completion_tokens),
        )
        .where(within(table, start, period), scope.where(table), table.c.outcome.in_([item.value for item in BILLED]))
        .group_by("bucket", *columns)
        .order_by("bucket", *columns)
    )
    if width is None and not columns:
        query = query.having(func.count() > 0)
    count = len(columns)
    return [
        UsageRow(row[0], tuple(row[1 : 1 + count]), *(int(value) for value in row[1 + count :]))
        for row in connection.execute(query)
    ]


def source_of(
    connection: Connection, scope: Scope, period: Period, width: Width | None, by: Sequence[By]
) -> tuple[FromClause, str]:
    """The smallest table of sums that has what is asked for, and its column with the bucket's start."""
    if width is Width.MINUTE:
        return minutes(period), START
    daily = width is Width.DAY or (width is None and period == period.aligned(Width.DAY))
    if not daily:
        return usage_hour, "hour_unix_s"
    if scope.all_keys and By.KEY not in by:
        return (model_day if width else of_days(connection, model_day, model_span, period)), "day_unix_s"
    return usage_day, "day_unix_s"


def of_days(connection: Connection, days: Table, spans: Table, period: Period) -> FromClause:
    """The sums of whole days, with those of spans in place of their days wherever they are made. Same columns."""
    start, end = period.start_unix_s, period.end_unix_s
    whole = span.c.day_unix_s.between(start, end - SPAN_S)
    if not (made := sorted(connection.execute(select(span.c.day_unix_s).where(whole)).scalars())):
        return days
    gaps = pairwise([start, *(edge for one in made for edge in (one, one + SPAN_S)), end])
    rest = [select(days).where(days.c.day_unix_s >= a, days.c.day_unix_s < b) for a, b in islice(gaps, 0, None, 2)]
    return union_all(select(spans).where(spans.c.day_unix_s.in_(made)), *rest).subquery(spans.name)


def within(table: FromClause, start: str, period: Period) -> ColumnElement[bool]:
    """The condition that a row's bucket begins in the period."""
    return and_(table.c[start] >= period.start_unix_s, table.c[start] < period.end_unix_s)
