"""One adapter: under which uids it was used, how long it was resident, and whether its month's invoice is closed."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, select

from lorapool_ledger.reports.fleet import held
from lorapool_ledger.reports.periods import Period
from lorapool_ledger.reports.usage import within
from lorapool_ledger.store.tables import boot, invoice, model_day


@dataclass(frozen=True, slots=True)
class Residency:
    byte_ns: int
    """Bytes of the device that it occupied times nanoseconds, over all pods."""
    gpu_ns: int
    uids: frozenset[str]
    """Of the LoraAdapters that had the name."""
    boots: frozenset[int]
    """The runtime processes that had them."""

    @property
    def gib_hours(self) -> float:
        return self.byte_ns / (2**30 * 3600e9)

    @property
    def gpu_s(self) -> float:
        return self.gpu_ns / 1e9


def uids_used(connection: Connection, model: str, period: Period) -> set[str]:
    """The uids under which this name was used: its LoraAdapter may have been deleted and created again."""
    used = select(model_day.c.uid).distinct()
    used = used.where(model_day.c.project == model.partition("/")[0], within(model_day, "day_unix_s", period))
    return set(connection.execute(used.where(model_day.c.model == model)).scalars()) - {""}


def residency(connection: Connection, model: str, period: Period) -> Residency:
    """What adapters of this name occupied and computed."""
    rows = held(connection, period, lambda table: (table.c.model == model) & (table.c.uid != ""))
    return Residency(
        sum(row.byte_ns for row in rows),
        sum(row.gpu_ns for row in rows),
        frozenset(row.uid for row in rows),
        frozenset(row.boot for row in rows),
    )


def boots_of_base(connection: Connection, base: str) -> set[int]:
    """The runtime processes of a base."""
    return set(connection.execute(select(boot.c.id).where(boot.c.base == base)).scalars())


def closed_invoice(connection: Connection, project: str, month: str) -> tuple[int, str] | None:
    """When the invoice of a month was closed, in Unix seconds, and its document's sha256; None while it is open."""
    row = connection.execute(
        select(invoice.c.closed_unix_s, invoice.c.sha256).where(invoice.c.project == project, invoice.c.month == month)
    ).one_or_none()
    return None if row is None else (row[0], row[1])
