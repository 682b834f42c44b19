"""Usage, charges and what was held on devices, by project and model: each table is read once for all that a page shows.

The amounts are those of `charges` with the same scope and period, to the last digit.
"""

from __future__ import annotations

from collections import defaultdict
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import Connection, func, select

from lorapool_ledger.billing.billed import BILLED
from lorapool_ledger.billing.prices import UNITS, LineItem
from lorapool_ledger.reports.charges import PRECISION, PriceBook, corrections, of_scope
from lorapool_ledger.reports.fleet import Held, held
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.reports.usage import source_of, within
from lorapool_ledger.store.tables import boot

_ITEMS = (LineItem.PROMPT, LineItem.CACHED, LineItem.COMPLETION, LineItem.REQUEST)


class Sum(NamedTuple):
    """What is billed to one model or project: requests, tokens (cached ones included) and the amount."""

    requests: int = 0
    tokens: int = 0
    amount: Decimal = Decimal(0)


_Sums = dict[tuple[str, str], list[Any]]
"""By project and model, the values of a Sum: with 10,000 models, lists are added up faster."""


class Totals:
    """The sums of a period of whole UTC days."""

    def __init__(self, connection: Connection, scope: Scope, period: Period, book: PriceBook) -> None:
        """Reads them. `outcomes` is by outcome: requests, computed tokens and GPU nanoseconds."""
        changes = {price.effective_unix_s for price in book.prices.prices}
        inside = sorted(at for at in changes if period.start_unix_s < at < period.end_unix_s)
        counted: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        sums: _Sums = defaultdict(lambda: list(Sum()))
        self.held: list[Held] = []
        """What adapters and bases held and computed on each pod; for the owner alone also where nothing is charged."""
        with localcontext(prec=PRECISION):
            for start, end in pairwise([period.start_unix_s, *inside, period.end_unix_s]):
                _add_usage(connection, scope, Period(start, end), book, counted, sums)
                if scope.owner or (scope.keys is None and book.has(LineItem.RESIDENCY)):
                    self.held += held(connection, Period(start, end), lambda table: of_scope(scope, table))
            _add_residency(connection, self.held if scope.keys is None else [], book, sums)
            for project, model, amount in corrections(connection, scope, period):
                sums[project, model][2] += amount
        self.outcomes = {name: (values[0], values[1], values[2]) for name, values in counted.items()}
        self._sums = sums

    def projects(self) -> dict[str, Sum]:
        return self._by(0)

    def models(self) -> dict[str, Sum]:
        return self._by(1)

    def _by(self, place: int) -> dict[str, Sum]:
        found: dict[str, list[Any]] = defaultdict(lambda: list(Sum()))
        with localcontext(prec=PRECISION):
            for names, one in self._sums.items():
                _add(found[names[place]], *one)
        return {name: Sum(*values) for name, values in found.items()}


def _add(kept: list[Any], requests: int, tokens: int, amount: Decimal) -> None:
    kept[0] += requests
    kept[1] += tokens
    kept[2] += amount


def _add_usage(
    connection: Connection,
    scope: Scope,
    part: Period,
    book: PriceBook,
    counted: dict[str, list[int]],
    sums: _Sums,
) -> None:
    table, start = source_of(connection, scope, part, None, [])
    names = (table.c.project, table.c.model, table.c.base, table.c.outcome)
    query = (
        select(
            *names,
            func.sum(table.c.requests),
            func.sum(table.c.prompt_tokens - table.c.cached_tokens + table.c.completion_tokens),
            func.sum(table.c.gpu_ns),
            func.sum(table.c.billed_prompt_tokens),
            func.sum(table.c.billed_cached_tokens),
            func.sum(table.c.billed_completion_tokens),
        )
        .where(within(table, start, part), scope.where(table))
        .group_by(*names)
    )
    billed = {item.value for item in BILLED}
    million, each = Decimal(UNITS[LineItem.PROMPT][1]), Decimal(UNITS[LineItem.REQUEST][1])
    rates: dict[tuple[str, str, str], list[Decimal]] = {}
    for project, model, base, outcome, requests, computed, gpu_ns, *tokens in connection.execute(query).all():
        of = counted[outcome]
        of[0], of[1], of[2] = of[0] + int(requests), of[1] + int(computed), of[2] + int(gpu_ns)
        if outcome not in billed:
            continue
        key = (
            project if project in book.projects else "",
            base if base in book.models else "",
            model if model in book.models else "",
        )
        if key not in rates:
            prices = (book.at(part.start_unix_s, item, project=key[0], base=key[1], model=key[2]) for item in _ITEMS)
            rates[key] = [Decimal(0) if price is None else price.amount for price in prices]
        prompt, cached, completion = map(int, tokens)
        of_prompt, of_cached, of_completion, of_request = rates[key]
        amount = (prompt * of_prompt + cached * of_cached + completion * of_completion) / million
        amount += int(requests) * of_request / each
        _add(sums[project, model], int(requests), prompt + cached + completion, amount)


def _add_residency(connection: Connection, rows: list[Held], book: PriceBook, sums: _Sums) -> None:
    if not rows or not book.has(LineItem.RESIDENCY):
        return
    bases: dict[int, str] = {row[0]: row[1] for row in connection.execute(select(boot.c.id, boot.c.base))}
    weighed: dict[str, Decimal] = defaultdict(Decimal)
    for row in rows:
        if row.uid and row.byte_ns:
            project = row.model.partition("/")[0]
            price = book.at(
                row.start_unix_s, LineItem.RESIDENCY, project=project, base=bases[row.boot], model=row.model
            )
            if price is not None:
                weighed[row.model] += row.byte_ns * price.amount
    for model, weight in weighed.items():
        project = model.partition("/")[0]
        sums[project, model][2] += weight / UNITS[LineItem.RESIDENCY][1]
