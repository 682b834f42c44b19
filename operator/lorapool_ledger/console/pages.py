"""The pages of the console. Each is a function of a read-only connection that returns the values of its template."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import Connection

from lorapool_api.usage_protocol import AttemptEnd
from lorapool_gateway.routing.auth import ApiKey
from lorapool_ledger.billing.billed import BILLED, Billed
from lorapool_ledger.console.charts import Series, bars, meter
from lorapool_ledger.console.live import AdapterNow, JobNow, LimitNow
from lorapool_ledger.console.periods import Shown
from lorapool_ledger.console.render import amount_text
from lorapool_ledger.reports import adapters as adapter_reports
from lorapool_ledger.reports.charges import API_UNITS, CORRECTION, Charge, Dimension, PriceBook, charges
from lorapool_ledger.reports.fleet import FleetCost, fleet_cost, pods
from lorapool_ledger.reports.health import (
    CHECKS,
    cold_starts,
    findings,
    health,
    key_names,
    life,
    outcomes,
    refusals,
    writers,
)
from lorapool_ledger.reports.lookups import WHY, find_request, latest_incomplete
from lorapool_ledger.reports.periods import DAY, Period, Width, month_of
from lorapool_ledger.reports.scope import Scope
from lorapool_ledger.reports.totals import Sum, Totals
from lorapool_ledger.reports.usage import By, usage

TOP = 10
PAGE = 50
WASTE = (Billed.FAILED, Billed.LOST, Billed.WITHHELD)
INCOMPLETE = tuple(end for end in AttemptEnd if end is not AttemptEnd.COMPLETED)
ITEMS = {
    "prompt": "Prompt tokens",
    "cached": "Cached prompt tokens",
    "completion": "Generated tokens",
    "request": "Requests",
    "residency": "Residency",
    CORRECTION: "Correction",
}
UNITS = {
    "prompt": "1M tokens",
    "cached": "1M tokens",
    "completion": "1M tokens",
    "request": "request",
    "residency": "GiB h",
    "pod": "pod hour",
}


class NoSuchPageError(Exception):
    """There is no such page for this caller."""


@dataclass(frozen=True, slots=True)
class View:
    """Who looks at what, and what is known of the present."""

    key: ApiKey
    scope: Scope
    shown: Shown
    now_unix_s: float
    query: dict[str, str] = field(default_factory=dict)
    limits: Sequence[LimitNow] = ()
    adapter: Callable[[str], AdapterNow | None] = lambda model: None
    jobs: Sequence[JobNow] = ()

    @property
    def period(self) -> Period:
        return self.shown.period

    @property
    def last_day(self) -> Period:
        """The last 24 hours, of which single attempts are listed."""
        end = int(self.now_unix_s) + 1
        return Period(end - DAY, end)

    def require_owner(self) -> None:
        if not self.scope.owner:
            raise NoSuchPageError


Context = dict[str, Any]


class Line(NamedTuple):
    """What one adapter or project earned and cost."""

    name: str
    requests: int
    tokens: int
    revenue: Decimal
    cost: Decimal = Decimal(0)

    @property
    def margin(self) -> Decimal:
        return self.revenue - self.cost


def overview(connection: Connection, view: View) -> Context:
    """The owner's first page."""
    view.require_owner()
    book = PriceBook.read(connection)
    by_day = charges(connection, view.scope, view.period, [Dimension.DAY], book=book)
    totals = Totals(connection, view.scope, view.period, book)
    cost = fleet_cost(connection, view.period, book.prices, rows=totals.held)
    ended = totals.outcomes
    revenue = _sum(by_day)
    return {
        "health": health(connection, view.now_unix_s),
        "currency": book.currency,
        "revenue": revenue,
        "cost": cost,
        "margin": revenue - cost.total,
        "waste_tokens": sum(ended.get(item.value, (0, 0, 0))[1] for item in WASTE),
        "waste_cost": _waste(ended, cost),
        "ended": ended,
        "requests": sum(item[0] for item in ended.values()),
        "tokens_chart": _tokens_chart(connection, view),
        "money_chart": _money_chart(view, by_day, book.currency),
        "bases": _bases(connection, view, cost),
        "projects": _project_lines(totals, cost)[:TOP],
        "models": _lines(totals.models(), cost.models)[:TOP],
        "cold": cold_starts(connection, view.last_day),
        "limits": [item for item in view.limits if item.share >= 0.7][:TOP],
        "jobs": [job for job in view.jobs if job.phase not in ("Succeeded", "Failed", "Cancelled")][:5],
        "meter": meter,
    }


def bases(connection: Connection, view: View) -> Context:
    view.require_owner()
    book = PriceBook.read(connection)
    cost = fleet_cost(connection, view.period, book.prices)
    return {
        "currency": book.currency,
        "cost": cost,
        "bases": _bases(connection, view, cost),
        "pods": pods(connection, view.period),
        "meter": meter,
    }


def adapters(connection: Connection, view: View) -> Context:
    """Adapters by revenue, a page at a time, of those whose name has the text that is searched for."""
    book = PriceBook.read(connection)
    totals = Totals(connection, view.scope, view.period, book)
    cost = fleet_cost(connection, view.period, book.prices, rows=totals.held) if view.scope.owner else FleetCost()
    search = view.query.get("q", "").strip()[:200]
    lines = [line for line in _lines(totals.models(), cost.models) if search.lower() in line.name.lower()]
    return {"currency": book.currency, "search": search, **_paged(lines, view)}


def adapter(connection: Connection, view: View, model: str) -> Context:
    """One adapter: its life, its usage, and why it is where it is."""
    if not (view.scope.projects is None or model.partition("/")[0] in view.scope.projects):
        raise NoSuchPageError
    scope = view.scope.narrowed(models=[model])
    now = view.adapter(model)
    book = PriceBook.read(connection)
    resident = adapter_reports.residency(connection, model, view.period)
    uids = sorted(adapter_reports.uids_used(connection, model, view.period) | resident.uids)
    lines = charges(connection, scope, view.period, [Dimension.DAY, Dimension.ITEM], book=book)
    if now is None and not uids and not lines:
        raise NoSuchPageError
    events = life(connection, model, uids) if uids else []
    ended = outcomes(connection, scope, view.period)
    cost = FleetCost()
    if view.scope.owner:
        boots = resident.boots | adapter_reports.boots_of_base(connection, model)
        cost = fleet_cost(connection, view.period, book.prices, boots=boots)
    return {
        "model": model,
        "now": now,
        "currency": book.currency,
        "items": _by_item(lines),
        "revenue": _sum(lines),
        "cost": cost.models.get(model, Decimal(0)),
        "ended": ended,
        "tokens_chart": _tokens_chart(connection, view, scope),
        "life": events if view.scope.owner else [],
        "loads": sum(event.type == "loaded" for event in events),
        "resident": resident,
        "why": WHY,
        "billed": {item.value for item in BILLED},
    }


def tenants(connection: Connection, view: View) -> Context:
    view.require_owner()
    book = PriceBook.read(connection)
    totals = Totals(connection, view.scope, view.period, book)
    cost = fleet_cost(connection, view.period, book.prices, rows=totals.held)
    lines = _project_lines(totals, cost)
    return {"currency": book.currency, **_paged(lines, view), "idle": cost.idle, "total": cost.total}


def project(connection: Connection, view: View, name: str | None = None) -> Context:
    """The tenant's first page: one project, or all that the key has."""
    scope = view.scope
    if name is not None:
        if not scope.permits_project(name):
            raise NoSuchPageError
        scope = scope.narrowed(projects=[name])
    book = PriceBook.read(connection)
    by_day = charges(connection, scope, view.period, [Dimension.DAY], book=book)
    by_key = usage(connection, scope, view.period, None, [By.KEY])
    key_costs = _amounts(charges(connection, scope, view.period, [Dimension.KEY], book=book), lambda item: item.key_uid)
    totals = Totals(connection, scope, view.period, book)
    lines = _lines(totals.models(), {})
    by_key.sort(key=lambda row: (-key_costs.get(row.group[0], Decimal(0)), row.group[0]))
    names = key_names(connection, [row.group[0] for row in by_key[:PAGE]])
    return {
        "project": name,
        "projects": sorted(scope.projects) if scope.projects is not None else [],
        "currency": book.currency,
        "spend": _sum(by_day),
        "requests": sum(row.requests for row in by_key),
        "input_tokens": sum(row.input_tokens for row in by_key),
        "cached_tokens": sum(row.cached_tokens for row in by_key),
        "output_tokens": sum(row.completion_tokens for row in by_key),
        "tokens_chart": _tokens_chart(connection, view, scope),
        "money_chart": _money_chart(view, by_day, book.currency),
        "models": lines[:PAGE],
        "more_models": max(0, len(lines) - PAGE),
        "keys": [(row, names.get(row.group[0], ""), key_costs.get(row.group[0], Decimal(0))) for row in by_key[:PAGE]],
        "more_keys": max(0, len(by_key) - PAGE),
        "ended": totals.outcomes,
        "why": WHY,
        "billed": {item.value for item in BILLED},
        "limits": view.limits,
        "meter": meter,
    }


def bill(connection: Connection, view: View, name: str | None = None) -> Context:
    """What a period costs, by model and line item, with corrections."""
    scope = view.scope
    if name is not None:
        if not scope.permits_project(name):
            raise NoSuchPageError
        scope = scope.narrowed(projects=[name])
    found = charges(connection, scope, view.period, [Dimension.PROJECT])
    shown = sorted({item.project for item in found})[:PAGE]
    by = [Dimension.PROJECT, Dimension.MODEL, Dimension.ITEM]
    listed: dict[str, list[Charge]] = defaultdict(list)
    for item in charges(connection, scope.narrowed(projects=shown), view.period, by):
        listed[item.project].append(item)
    return {
        "project": name,
        "bills": [(one, lines[: 20 * PAGE], _sum(lines)) for one, lines in sorted(listed.items())],
        "projects": len({item.project for item in found}),
        "closed": {one: adapter_reports.closed_invoice(connection, one, view.shown.name) for one in listed},
        "invoice_months": _months(view.period) if scope.keys is None and scope.models is None else [],
        "total": _sum(found),
        "currency": found[0].currency if found else PriceBook.read(connection).currency,
        "items": ITEMS,
        "units": API_UNITS,
    }


def reconciliation(connection: Connection, view: View) -> Context:
    view.require_owner()
    return {
        "health": health(connection, view.now_unix_s),
        "checks": CHECKS,
        "findings": findings(connection),
        "writers": writers(connection, view.now_unix_s)[:200],
    }


def failures(connection: Connection, view: View) -> Context:
    """What did not complete: totals of the period, and the latest attempts of the last day."""
    ended = outcomes(connection, view.scope, view.period)
    return {
        "ended": ended,
        "why": WHY,
        "billed": {item.value for item in BILLED},
        "attempts": latest_incomplete(connection, view.scope, view.last_day, INCOMPLETE),
        "refusals": refusals(connection, view.scope, view.period),
        "cold": cold_starts(connection, view.last_day) if view.scope.owner else None,
    }


def requests(connection: Connection, view: View) -> Context:
    """The attempts of a request id."""
    wanted = view.query.get("id", "").strip()[:128]
    found = find_request(connection, view.scope, wanted) if wanted else []
    return {"wanted": wanted, "attempts": found, "names": key_names(connection, {item.key_uid for item in found})}


def prices(connection: Connection, view: View) -> Context:
    """The prices that apply now, and those that applied before; of other tenants' models and projects none."""
    book = PriceBook.read(connection)

    def visible(scope: str) -> bool:
        return scope == "*" or view.scope.permits_project(scope.partition("/")[0])

    listed = [item for item in book.prices.prices if item.item.value != "pod" and visible(item.scope)]
    listed.sort(key=lambda item: (item.scope != "*", item.scope, item.item, -item.effective_unix_s))
    current: set[tuple[str, str]] = set()
    rows = []
    for item in listed:
        applies = item.effective_unix_s <= view.now_unix_s and (item.scope, item.item) not in current
        if applies:
            current.add((item.scope, item.item))
        rows.append((item, applies))
    return {"prices": rows[:500], "items": ITEMS, "units": UNITS}


def quotas(connection: Connection, view: View) -> Context:
    return {"limits": view.limits, "meter": meter}


def jobs(connection: Connection, view: View) -> Context:
    return {"jobs": list(view.jobs)[:200]}


def export(connection: Connection, view: View) -> Context:
    return {}


# --- parts


def _project_lines(totals: Totals, cost: FleetCost) -> list[Line]:
    costs: dict[str, Decimal] = defaultdict(Decimal)
    for model, part in cost.models.items():
        costs[model.partition("/")[0]] += part
    return _lines(totals.projects(), costs)


def _lines(sums: dict[str, Sum], costs: dict[str, Decimal]) -> list[Line]:
    none = Sum()
    found = [
        Line(name, *sums.get(name, none), cost=costs.get(name, Decimal(0)))
        for name in sums.keys() | {name for name, part in costs.items() if part}
    ]
    return sorted(found, key=lambda line: (-line.revenue, -line.cost, line.name))


def _bases(connection: Connection, view: View, cost: FleetCost) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for pod in pods(connection, view.period):
        base = found.setdefault(
            pod.base,
            {
                "name": pod.base,
                "pods": 0,
                "alive": 0,
                "uptime_ns": 0,
                "busy_ns": 0,
                "slots": 0,
                "slot_bytes": 0,
                "device_bytes": 0,
                "device": pod.device,
            },
        )
        base["pods"] += 1
        base["uptime_ns"] += pod.uptime_ns
        base["busy_ns"] += pod.busy_ns
        if not pod.end:
            base["alive"] += 1
            base["slots"] += pod.slots
            base["slot_bytes"] += pod.slot_bytes
            base["device_bytes"] += pod.device_bytes
    for name, base in found.items():
        base["busy"] = base["busy_ns"] / base["uptime_ns"] if base["uptime_ns"] else 0.0
        base["cost"] = cost.bases.get(name, Decimal(0))
        base["idle_cost"] = cost.idle_of_bases.get(name, Decimal(0))
    return [found[name] for name in sorted(found)]


def _tokens_chart(connection: Connection, view: View, scope: Scope | None = None) -> Any:
    rows = {
        row.start_unix_s: row
        for row in usage(connection, view.scope if scope is None else scope, view.period, Width.DAY)
    }
    starts = range(view.period.start_unix_s, view.period.end_unix_s, DAY)
    listed = [rows.get(start) for start in starts]
    parts = (
        Series("prompt", [row.prompt_tokens if row else 0 for row in listed]),
        Series("cached", [row.cached_tokens if row else 0 for row in listed]),
        Series("generated", [row.completion_tokens if row else 0 for row in listed]),
    )
    return bars("Tokens by day", view.shown.days, parts, lambda value: f"{value:,.0f}")


def _money_chart(view: View, by_day: Iterable[Charge], currency: str) -> Any:
    amounts: dict[int, Decimal] = defaultdict(Decimal)
    for item in by_day:
        amounts[item.day_unix_s] += item.amount
    starts = range(view.period.start_unix_s, view.period.end_unix_s, DAY)
    # Corrections may make a day negative, which a bar cannot show.
    values = [max(Decimal(0), amounts[start]) for start in starts]
    return bars(
        f"Cost by day in {currency}",
        view.shown.days,
        [Series("cost", values)],
        lambda value: amount_text(Decimal(str(value)), currency),
    )


def _by_item(lines: Iterable[Charge]) -> list[tuple[str, Decimal, str | None, Decimal]]:
    sums: dict[str, list[Decimal]] = defaultdict(lambda: [Decimal(0), Decimal(0)])
    for line in lines:
        sums[line.item][0] += line.quantity
        sums[line.item][1] += line.amount
    return [(ITEMS[item], sums[item][0], API_UNITS[item], sums[item][1]) for item in ITEMS if item in sums]


def _months(period: Period) -> list[str]:
    """The UTC months that the period touches, in order."""
    return sorted({month_of(start) for start in range(period.start_unix_s, period.end_unix_s, DAY)})


def _amounts(found: Iterable[Charge], name: Callable[[Charge], str]) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = defaultdict(Decimal)
    for item in found:
        sums[name(item)] += item.amount
    return dict(sums)


def _sum(found: Iterable[Charge]) -> Decimal:
    return sum((item.amount for item in found), Decimal(0))


def _waste(ended: dict[str, tuple[int, int, int]], cost: FleetCost) -> Decimal:
    """The part of the used cost that went into answers that were not delivered, by GPU time."""
    whole = sum(item[2] for item in ended.values())
    lost = sum(ended.get(item.value, (0, 0, 0))[2] for item in WASTE)
    return (cost.total - cost.idle) * lost / whole if whole else Decimal(0)


def _paged(lines: Sequence[Line], view: View) -> Context:
    text = view.query.get("page", "1")
    last = max(1, -(-len(lines) // PAGE))
    number = min(last, max(1, int(text))) if text.isascii() and text.isdigit() and len(text) < 7 else 1
    return {"lines": lines[(number - 1) * PAGE : number * PAGE], "found": len(lines), "page": number, "last_page": last}
