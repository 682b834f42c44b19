"""Sums by minute, which no table has: a query on the facts with the columns of the sums. For some hours at most.

An attempt counts in the minute in which the runtime ended it, or the gateway where there is no runtime's half.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from sqlalchemy import Case, ColumnElement, and_, case, func, literal, select, union_all
from sqlalchemy.sql.selectable import Subquery

from lorapool_api.usage_protocol import AttemptEnd, Ended
from lorapool_ledger.billing.billed import BILLED, Billed, final_outcome
from lorapool_ledger.reports.periods import MINUTE, Period
from lorapool_ledger.store.tables import attempt_closed, attempt_opened, boot, runtime_request
from lorapool_ledger.sums.joined import is_counted

START = "minute_unix_s"
_MS = MINUTE * 1000


def minutes(period: Period) -> Subquery:
    """The columns of `usage_hour`, with `minute_unix_s` as the start, of attempts that ended in the period."""
    return union_all(_by_runtimes(period), _by_gateways(period)).subquery("usage_minute")


def outcome_of_halves() -> Case[str]:
    """What `final_outcome` decides, as an expression on rows of `runtime_request` and `attempt_closed`."""
    runtime, gateway = runtime_request.c.outcome, attempt_closed.c.outcome
    halves = product([None, *Ended], [None, *AttemptEnd])
    return case(
        *(
            (and_(_is(runtime, first), _is(gateway, second)), final_outcome(first, second).value)
            for first, second in halves
        ),
        else_=Billed.UNKNOWN.value,
    )


def _is(column: ColumnElement[Any], value: str | None) -> ColumnElement[bool]:
    return column.is_(None) if value is None else column == str(value)


def _by_runtimes(period: Period) -> Any:
    fact, ended = runtime_request.c, runtime_request.c.ended_unix_ms
    outcome = outcome_of_halves()
    return (
        _summed(
            ended,
            [fact.project, fact.key_uid, boot.c.base, fact.uid, fact.model],
            outcome,
            fact.requests,
            fact.prompt_tokens,
            fact.cached_tokens,
            fact.completion_tokens,
        )
        .select_from(
            runtime_request.join(boot, boot.c.id == fact.boot).outerjoin(
                attempt_closed, and_(attempt_closed.c.attempt == fact.attempt, fact.attempt != "")
            )
        )
        .where(_in(ended, period), is_counted)
    )


def _by_gateways(period: Period) -> Any:
    opened, closed, ended = attempt_opened.c, attempt_closed.c, attempt_closed.c.closed_unix_ms
    prompt = func.coalesce(closed.prompt_tokens, 0)
    cached = func.coalesce(closed.cached_tokens, 0)
    return (
        _summed(
            ended,
            [opened.project, opened.key_uid, opened.base, opened.uid, opened.model],
            outcome_of_halves(),
            literal(1),
            prompt,
            case((cached > prompt, prompt), else_=cached),
            func.coalesce(closed.completion_tokens, 0),
        )
        .select_from(
            attempt_closed.join(attempt_opened, opened.attempt == closed.attempt).outerjoin(
                runtime_request, and_(runtime_request.c.attempt == closed.attempt, is_counted)
            )
        )
        .where(_in(ended, period), runtime_request.c.attempt.is_(None))
    )


def _summed(
    ended: ColumnElement[int],
    names: list[Any],
    outcome: Case[str],
    requests: ColumnElement[Any],
    prompt: ColumnElement[Any],
    cached: ColumnElement[Any],
    completion: ColumnElement[Any],
) -> Any:
    billed = outcome.in_([item.value for item in BILLED])

    def charged(tokens: ColumnElement[Any]) -> ColumnElement[Any]:
        return case((billed, tokens), else_=0)

    return select(
        ((ended - ended % _MS) // 1000).label(START),
        *names,
        outcome.label("outcome"),
        requests.label("requests"),
        charged(prompt - cached).label("billed_prompt_tokens"),
        charged(cached).label("billed_cached_tokens"),
        charged(completion).label("billed_completion_tokens"),
    )


def _in(column: ColumnElement[int], period: Period) -> ColumnElement[bool]:
    return and_(column >= period.start_unix_s * 1000, column < period.end_unix_s * 1000)
