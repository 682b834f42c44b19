"""What usage costs the tenants: sums of tokens, requests and residency times the prices that applied. Exact.

Prices take effect at the start of a UTC day, so the daily sums decide every amount. Models that have no price of their
own are summed together, so that 10,000 of them cost no more time than one. Amounts are rounded only to be shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from enum import StrEnum
from itertools import pairwise
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Label,
    case,
    false,
    func,
    literal,
    or_,
    select,
    true,
)
from sqlalchemy.sql.selectable import FromClause

from lorapool_ledger.billing.billed import BILLED
from lorapool_ledger.billing.prices import GIB_HOUR_BYTE_NS, UNITS, LineItem, Price, PriceList
from lorapool_ledger.reports.periods import DAY, Period, Width
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.reports.usage import By, of_days, source_of, within
from lorapool_ledger.store.tables import boot, correction, pod_day, pod_span, price
from lorapool_ledger.store.wide import exact, exact_sums

PRECISION = 80
"""Digits of exact products and sums."""

POD = "*"
"""The account of a pod as a whole."""
CORRECTION = "correction"
API_NAMES: Mapping[str, str] = {
    LineItem.PROMPT: "input_tokens",
    LineItem.CACHED: "cached_input_tokens",
    LineItem.COMPLETION: "output_tokens",
    LineItem.REQUEST: "requests",
    LineItem.RESIDENCY: "residency",
    CORRECTION: CORRECTION,
}
"""Names of line items for programs."""
API_UNITS: Mapping[str, str | None] = {
    LineItem.PROMPT: "tokens",
    LineItem.CACHED: "tokens",
    LineItem.COMPLETION: "tokens",
    LineItem.REQUEST: None,
    LineItem.RESIDENCY: "gibibyte_hours",
    CORRECTION: "tokens",
}
"""The API's names of quantities' units; None where it has none."""


@dataclass(frozen=True, slots=True)
class Charge:
    """One line. A dimension that is not grouped by is empty."""

    day_unix_s: int
    project: str
    key_uid: str
    model: str
    item: str
    """A LineItem or CORRECTION; empty: all items together."""
    quantity: Decimal
    """Tokens, requests or GiB hours; 0 where items are summed."""
    amount: Decimal
    currency: str

    @property
    def line_item(self) -> str:
        """`<model>, <item>`, as the API names it."""
        item = API_NAMES.get(self.item, "")
        return f"{self.model}, {item}" if self.model else item


class Dimension(StrEnum):
    DAY = "day"
    PROJECT = "project"
    KEY = "key_uid"
    MODEL = "model"
    ITEM = "item"


class PriceBook:
    """The prices of all times, and which models and projects have prices of their own."""

    def __init__(self, prices: PriceList) -> None:
        self.prices = prices
        scopes = {price.scope for price in prices.prices if price.item is not LineItem.POD} - {"*"}
        self.projects = frozenset(scope.removesuffix("/") for scope in scopes if scope.endswith("/"))
        self.models = frozenset(scope for scope in scopes if not scope.endswith("/"))
        """Models and bases with a price of their own."""
        self._found: dict[tuple[int, LineItem, str, str, str], Price | None] = {}

    def has(self, *items: LineItem) -> bool:
        """Whether one of these items has ever had a price."""
        return any(price.item in items for price in self.prices.prices)

    def only(self, *items: LineItem) -> PriceBook:
        """The prices of these items alone, so that fewer models have prices of their own."""
        return PriceBook(PriceList(price for price in self.prices.prices if price.item in items))

    @classmethod
    def read(cls, connection: Connection) -> PriceBook:
        found = connection.execute(select(price))
        return cls(
            PriceList(
                Price(row.effective_unix_s, row.scope, LineItem(row.line_item), Decimal(row.amount), row.currency)
                for row in found
            )
        )

    @property
    def currency(self) -> str:
        return self.prices.currency or "USD"

    def changes_within(self, period: Period) -> list[int]:
        """The days inside the period on which a price of tenants changes."""
        found = {item.effective_unix_s for item in self.prices.prices if item.item is not LineItem.POD}
        return sorted(at for at in found if period.start_unix_s < at < period.end_unix_s)

    def at(self, unix_s: int, item: LineItem, *, project: str, base: str, model: str) -> Price | None:
        """The price that applies to usage at this time."""
        project = project if project in self.projects else ""
        base = base if base in self.models else ""
        model = model if model in self.models or model.endswith("/") else ""
        key = (unix_s, item, project, base, model)
        if key not in self._found:
            self._found[key] = self.prices.price(item, unix_s, project=project, model=model, base=base)
        return self._found[key]


_USAGE_ITEMS = (LineItem.PROMPT, LineItem.CACHED, LineItem.COMPLETION, LineItem.REQUEST)

Group = tuple[int, str, str, str, str, str]


def charges(
    connection: Connection,
    scope: Scope,
    period: Period,
    by: Iterable[Dimension] = (),
    *,
    book: PriceBook | None = None,
) -> list[Charge]:
    """The charges of whole UTC days, by the wanted dimensions and by currency, in order."""
    wanted = frozenset(by)
    book = PriceBook.read(connection) if book is None else book
    with localcontext(prec=PRECISION):
        sums: dict[Group, list[Decimal]] = defaultdict(lambda: [Decimal(0), Decimal(0)])
        of_usage, of_residency = book.only(*_USAGE_ITEMS), book.only(LineItem.RESIDENCY)
        for part in _priced_alike(period, book):
            for group, quantity, rate in (
                *_of_usage(connection, scope, part, wanted, of_usage),
                *_of_residency(connection, scope, part, wanted, of_residency),
            ):
                sums[group][0] += quantity
                sums[group][1] += quantity * rate
        for group, quantity, amount in _of_corrections(connection, scope, period, wanted):
            sums[group][0] += quantity
            sums[group][1] += amount
        return _merged(sums, keep_items=Dimension.ITEM in wanted)


def totals(found: Iterable[Charge]) -> dict[str, Decimal]:
    """The amounts by currency."""
    with localcontext(prec=PRECISION):
        sums: dict[str, Decimal] = defaultdict(Decimal)
        for charge in found:
            sums[charge.currency] += charge.amount
        return dict(sums)


def _merged(sums: dict[Group, list[Decimal]], *, keep_items: bool) -> list[Charge]:
    lines: dict[Group, list[Decimal]] = defaultdict(lambda: [Decimal(0), Decimal(0)])
    for (day, project, key, model, item, currency), (quantity, amount) in sums.items():
        line = lines[day, project, key, model, item if keep_items else "", currency]
        if keep_items:
            line[0] += quantity / (GIB_HOUR_BYTE_NS if item == LineItem.RESIDENCY else 1)
        line[1] += amount if item == CORRECTION else amount / UNITS[LineItem(item)][1]
    ordered = sorted(lines.items())
    return [Charge(*key[:5], quantity, amount, key[5]) for key, (quantity, amount) in ordered]


def _priced_alike(period: Period, book: PriceBook) -> Iterator[Period]:
    """Parts of the period in which no price changes."""
    for start, end in pairwise([period.start_unix_s, *book.changes_within(period), period.end_unix_s]):
        yield Period(start, end)


def _of_usage(
    connection: Connection, scope: Scope, part: Period, wanted: frozenset[Dimension], book: PriceBook
) -> Iterator[tuple[Group, int, Decimal]]:
    by_key = Dimension.KEY in wanted
    width = Width.DAY if Dimension.DAY in wanted else None
    table, start = source_of(connection, scope, part, width, [By.KEY] if by_key else [])
    day = table.c[start] if Dimension.DAY in wanted else literal(0)
    items = (
        (LineItem.PROMPT, table.c.billed_prompt_tokens),
        (LineItem.CACHED, table.c.billed_cached_tokens),
        (LineItem.COMPLETION, table.c.billed_completion_tokens),
        (LineItem.REQUEST, table.c.requests),
    )
    billed = within(table, start, part) & scope.where(table) & table.c.outcome.in_([item.value for item in BILLED])
    listed = sorted(book.models)
    own = or_(table.c.project.in_(sorted(book.projects)), table.c.base.in_(listed), table.c.model.in_(listed))
    # What has no price of its own is summed apart: where it is grouped by days alone, nothing has to be sorted.
    none: frozenset[str] = frozenset()
    classes = [(none, none, ~own), (book.projects, book.models, own)] if book.projects or book.models else []
    for projects, models, priced in classes or [(none, none, true())]:
        names = [
            _or_class(table.c.project, Dimension.PROJECT in wanted, projects),
            table.c.key_uid if by_key else literal(""),
            _or_class(table.c.base, False, models),
            _or_class(table.c.model, Dimension.MODEL in wanted, models),
        ]
        groups = _labelled([day, *names])
        query = select(*groups, *(func.sum(column) for _, column in items)).where(billed, priced)
        for row in connection.execute(query.group_by(*_varying(groups))):
            day_unix_s, project, key, base, model = row[:5]
            for (item, _), quantity in zip(items, row[5:], strict=True):
                found = book.at(part.start_unix_s, item, project=project, base=base, model=model)
                if found is not None and quantity:
                    group = _group(wanted, day_unix_s, project, key, model, item, found.currency)
                    yield group, int(quantity), found.amount


def _of_residency(
    connection: Connection, scope: Scope, part: Period, wanted: frozenset[Dimension], book: PriceBook
) -> Iterator[tuple[Group, int, Decimal]]:
    """Residency is charged to the adapter's project, and to no key."""
    if scope.keys is not None or not book.has(LineItem.RESIDENCY):
        return
    table, start = pod_day if Dimension.DAY in wanted else of_days(connection, pod_day, pod_span, part), "day_unix_s"
    by_model = bool(wanted & {Dimension.MODEL, Dimension.PROJECT})
    day = table.c[start] if Dimension.DAY in wanted else literal(0)
    model = table.c.model if by_model else _class_of_model(table.c.model, book)
    of_pods = not (by_model or book.projects or book.models) and scope.projects is None and scope.models is None
    accounts = table.c.uid == POD if of_pods else table.c.uid.not_in(["", POD])
    groups = _labelled([day, _or_class(boot.c.base, False, book.models), model])
    query = (
        select(*groups, *exact_sums(table.c.byte_ns))
        .select_from(table.join(boot, boot.c.id == table.c.boot) if book.models else table)
        .where(within(table, start, part), accounts, of_scope(scope, table))
        .group_by(*_varying(groups))
    )
    rows: Sequence[Any] = connection.execute(query).all()
    for day_unix_s, base, name, high, low in rows:
        project = name.partition("/")[0]
        found = book.at(part.start_unix_s, LineItem.RESIDENCY, project=project, base=base, model=name)
        quantity = exact(high, low)
        if found is not None and quantity:
            yield (
                _group(wanted, day_unix_s, project, "", name, LineItem.RESIDENCY, found.currency),
                quantity,
                found.amount,
            )


def corrections(connection: Connection, scope: Scope, period: Period) -> Iterator[tuple[str, str, Decimal]]:
    """Project, model and amount of each correction that was recorded in the period."""
    for (_, project, _, model, _, _), _, amount in _of_corrections(connection, scope, period, frozenset(Dimension)):
        yield project, model, amount


def _of_corrections(
    connection: Connection, scope: Scope, period: Period, wanted: frozenset[Dimension]
) -> Iterator[tuple[Group, int, Decimal]]:
    at, table = correction.c.recorded_unix_s, correction
    tokens = table.c.prompt_tokens + table.c.cached_tokens + table.c.completion_tokens
    query = select(at, table.c.project, table.c.key_uid, table.c.model, tokens, table.c.amount, table.c.currency).where(
        at >= period.start_unix_s, at < period.end_unix_s, scope.where(table)
    )
    for recorded, project, key, model, quantity, amount, currency in connection.execute(query):
        day = recorded // DAY * DAY
        group = _group(wanted, day, project, key, model, CORRECTION, currency)
        yield group, int(quantity), Decimal(amount)


def _group(
    wanted: frozenset[Dimension], day: int, project: str, key: str, model: str, item: str, currency: str
) -> Group:
    return (
        day if Dimension.DAY in wanted else 0,
        project if Dimension.PROJECT in wanted else "",
        key if Dimension.KEY in wanted else "",
        model if Dimension.MODEL in wanted else "",
        item,
        currency,
    )


def _or_class(column: ColumnElement[Any], whole: bool, special: frozenset[str]) -> ColumnElement[Any]:
    """The column itself, or only those of its values that have prices of their own: fewer groups, the same prices."""
    if whole:
        return column
    return case((column.in_(sorted(special)), column), else_="") if special else literal("")


def _class_of_model(model: ColumnElement[Any], book: PriceBook) -> ColumnElement[Any]:
    """The model where it has a price of its own, else `<project>/` where that has one, else empty."""
    cases: list[Any] = [(model.in_(sorted(book.models)), model)] if book.models else []
    cases += [(model.startswith(f"{name}/", autoescape=True), f"{name}/") for name in sorted(book.projects)]
    return case(*cases, else_="") if cases else literal("")


def of_scope(scope: Scope, table: FromClause) -> ColumnElement[bool]:
    """The condition on sums of pods, whose rows have no project but the one in the model's name."""
    model = table.c.model
    condition: ColumnElement[bool] = true()
    if scope.models is not None:
        condition &= model.in_(sorted(scope.models))
    if scope.projects is not None:
        names = sorted(f"{name}/" for name in scope.projects)
        condition &= or_(false(), *((model >= name) & (model < f"{name[:-1]}0") for name in names))  # "0" follows "/"
        if len(names) > 1:  # most models are outside of all ranges, and need no look at each of them
            condition = (model >= names[0]) & (model < f"{names[-1][:-1]}0") & condition
    return condition


def _varying(groups: Iterable[Label[Any]]) -> list[str]:
    """The names of those that are no constants: by the first column of a key alone, nothing needs to be sorted."""
    return [group.name for group in groups if not isinstance(group.element, BindParameter)]


def _labelled(columns: Sequence[ColumnElement[Any]]) -> list[Label[Any]]:
    return [column.label(f"group_{number}") for number, column in enumerate(columns)]
