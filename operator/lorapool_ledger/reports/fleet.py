"""What runtime pods did in a period, and what that cost the provider. For the owner alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, func, select, true
from sqlalchemy.sql.selectable import FromClause

from lorapool_ledger.billing.cost import Used, money, pod_cost, split_cost
from lorapool_ledger.billing.prices import LineItem, PriceList
from lorapool_ledger.reports.charges import POD
from lorapool_ledger.reports.periods import Period, Width
from lorapool_ledger.reports.usage import of_days, within
from lorapool_ledger.store.tables import boot, pod_day, pod_hour, pod_span
from lorapool_ledger.store.wide import exact, exact_sums


@dataclass(frozen=True, slots=True)
class PodUse:
    """One runtime process in the period."""

    boot: int
    pod: str
    base: str
    profile: str
    device: str
    slots: int
    slot_bytes: int
    device_bytes: int
    started_unix_ms: int
    seen_unix_ms: int
    end: str
    """Empty while it lives."""
    uptime_ns: int
    busy_ns: int

    @property
    def busy(self) -> float:
        """The share of its uptime in which its engine computed, 0 to 1."""
        return min(1.0, self.busy_ns / self.uptime_ns) if self.uptime_ns else 0.0


@dataclass(frozen=True, slots=True)
class FleetCost:
    """What pods cost, in the currency of their prices."""

    total: Decimal = Decimal(0)
    idle: Decimal = Decimal(0)
    models: dict[str, Decimal] = field(default_factory=dict)
    """By adapter, `namespace/name`; of the base's own requests by the base's name."""
    bases: dict[str, Decimal] = field(default_factory=dict)
    """The total by base."""
    idle_of_bases: dict[str, Decimal] = field(default_factory=dict)
    unpriced_pods: int = 0
    """Pods whose profile has no price: they are in no sum."""


def pods(connection: Connection, period: Period, boots: Collection[int] | None = None) -> list[PodUse]:
    """The processes that lived in the period, by base and pod; only these boots unless None."""
    table, start = _source(connection, period)
    query = (
        select(boot, func.sum(table.c.uptime_ns).label("uptime_ns"), func.sum(table.c.gpu_ns).label("busy_ns"))
        .join(table, table.c.boot == boot.c.id)
        .where(table.c.uid == POD, within(table, start, period))
        .group_by(boot.c.id)
        .order_by(boot.c.base, boot.c.pod, boot.c.id)
    )
    if boots is not None:
        query = query.where(boot.c.id.in_(sorted(boots)))
    return [_pod(row) for row in connection.execute(query)]


def fleet_cost(
    connection: Connection,
    period: Period,
    prices: PriceList,
    *,
    rows: Sequence[Held] | None = None,
    boots: Collection[int] | None = None,
) -> FleetCost:
    """Splits the cost of every pod over the adapters that used it. The parts and idle add up to the total.

    `rows`: what all accounts used, where it is known already. `boots`: the cost of these processes alone.
    """
    total, idle, unpriced = 0, 0, set()
    by_model: dict[str, int] = defaultdict(int)
    by_base: dict[str, int] = defaultdict(int)
    idle_of_bases: dict[str, int] = defaultdict(int)

    def of_boots(table: FromClause) -> ColumnElement[bool]:
        return true() if boots is None else table.c.boot.in_(sorted(boots))

    for part in _priced_alike(period, prices):
        used = _accounts(held(connection, part, of_boots) if rows is None else rows, part)
        for pod in pods(connection, part, boots):
            price = prices.pod_price(pod.profile, part.start_unix_s)
            if price is None:
                unpriced.add(pod.boot)
                continue
            cost = pod_cost(price.amount, pod.uptime_ns)
            split = split_cost(
                cost,
                used.get(pod.boot, {}),
                uptime_ns=pod.uptime_ns,
                slot_bytes=pod.slot_bytes,
                device_bytes=pod.device_bytes,
            )
            total, idle = total + cost, idle + split.idle
            by_base[pod.base] += cost
            idle_of_bases[pod.base] += split.idle
            for model, share in split.accounts.items():
                by_model[model or pod.base] += share.total
    return FleetCost(money(total), money(idle), _money(by_model), _money(by_base), _money(idle_of_bases), len(unpriced))


class Held(NamedTuple):
    """What one account used of one pod in a part of a period; the uid of the base's own requests is empty."""

    start_unix_s: int
    """Where the part begins."""
    boot: int
    uid: str
    model: str
    gpu_ns: int
    byte_ns: int


def held(
    connection: Connection, part: Period, of: Callable[[FromClause], ColumnElement[bool]] = lambda table: true()
) -> list[Held]:
    """What each account used of each pod, of the accounts that fulfil a condition on the sums of pods."""
    table, start = _source(connection, part)
    query = (
        select(
            table.c.boot, table.c.uid, func.max(table.c.model), func.sum(table.c.gpu_ns), *exact_sums(table.c.byte_ns)
        )
        .where(table.c.uid != POD, within(table, start, part), of(table))
        .group_by(table.c.boot, table.c.uid)
    )
    return [
        Held(part.start_unix_s, number, uid, model, int(gpu_ns), exact(high, low))
        for number, uid, model, gpu_ns, high, low in connection.execute(query).all()
    ]


def _accounts(rows: Iterable[Held], part: Period) -> dict[int, dict[str, Used]]:
    """By pod, what each account used of it, by its model's name; the base's own requests have an empty name."""
    found: dict[int, dict[str, Used]] = defaultdict(dict)
    for row in rows:
        if part.start_unix_s <= row.start_unix_s < part.end_unix_s:
            name, of_pod = row.model if row.uid else "", found[row.boot]
            before = of_pod.get(name)
            gpu_ns, byte_ns = row.gpu_ns, row.byte_ns
            of_pod[name] = (
                Used(gpu_ns, byte_ns) if before is None else Used(before.gpu_ns + gpu_ns, before.byte_ns + byte_ns)
            )
    return found


def _priced_alike(period: Period, prices: PriceList) -> Iterator[Period]:
    changes = {price.effective_unix_s for price in prices.prices if price.item is LineItem.POD}
    inside = sorted(at for at in changes if period.start_unix_s < at < period.end_unix_s)
    for start, end in pairwise([period.start_unix_s, *inside, period.end_unix_s]):
        yield Period(start, end)


def _source(connection: Connection, period: Period) -> tuple[FromClause, str]:
    if period != period.aligned(Width.DAY):
        return pod_hour, "hour_unix_s"
    return of_days(connection, pod_day, pod_span, period), "day_unix_s"


def _money(units: dict[str, int]) -> dict[str, Decimal]:
    return {name: money(value) for name, value in units.items()}


def _pod(row: Any) -> PodUse:
    of: Callable[[str], Any] = row._mapping.__getitem__
    return PodUse(
        boot=of("id"),
        uptime_ns=int(of("uptime_ns")),
        busy_ns=int(of("busy_ns")),
        **{
            name: of(name)
            for name in (
                *("pod", "base", "profile", "device", "slots", "slot_bytes", "device_bytes"),
                *("started_unix_ms", "seen_unix_ms", "end"),
            )
        },
    )
