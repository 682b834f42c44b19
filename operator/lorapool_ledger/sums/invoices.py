"""Invoices from the daily sums: that of an open month as it is now, and the closing of months that are over.

A month is closed `close_after_days` after its end, when all its sums are made, for every project at once. Its documents
never change; what arrives later is in the invoices of the month that is open then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from sqlalchemy import Connection, func, select

from lorapool_ledger.billing.billed import BILLED
from lorapool_ledger.billing.invoice import (
    Line,
    Used,
    correction_line,
    document,
    late_lines,
    lines_in,
    lines_of,
    month_bounds,
    month_of,
    sha256_of,
)
from lorapool_ledger.billing.prices import DAY_S, LineItem, PriceList
from lorapool_ledger.intake.corrections import corrections_of
from lorapool_ledger.intake.price_list import read_prices
from lorapool_ledger.store.database import Database, DatabaseAwayError
from lorapool_ledger.store.tables import boot, correction, dirty_hour, invoice, mark, model_day, pod_day
from lorapool_ledger.store.writes import insert_new, set_mark

log = logging.getLogger("lorapool_ledger")

LATE_MONTHS = 3
"""Closed months that are compared with the sums for what arrived late."""
CHECK_S = 600.0
"""How often it is looked whether a month can be closed."""
_CLOSED = "closed_month"
"""The mark with the last closed month, as the number 202611."""


def invoice_of(connection: Connection, project: str, month: str, prices: PriceList | None = None) -> str:
    """The document of a project's month: the stored one, or of an open month what it comes to now.

    Raises ValueError for what is no month.
    """
    month_bounds(month)
    stored = select(invoice.c.document).where(invoice.c.project == project, invoice.c.month == month)
    if found := connection.execute(stored).scalar():
        return str(found)
    prices = prices or read_prices(connection)
    return document(project, month, prices.currency, _lines(connection, project, month, prices), closed_unix_s=None)


def closed_months(connection: Connection, project: str) -> list[tuple[str, str]]:
    """Months with a stored invoice of the project, newest first, each with the SHA-256 of its document."""
    query = select(invoice.c.month, invoice.c.sha256).where(invoice.c.project == project)
    return [(month, digest) for month, digest in connection.execute(query.order_by(invoice.c.month.desc()))]


def closed_through(connection: Connection) -> str:
    """The last closed month; empty before the first is closed."""
    value = connection.execute(select(mark.c.value).where(mark.c.name == _CLOSED)).scalar()
    return f"{value // 100:04d}-{value % 100:02d}" if value else ""


def close_month(connection: Connection, month: str, now_unix_s: float) -> int:
    """Stores the invoices of all projects for a month, and returns how many. Closed projects are left as they are."""
    prices = read_prices(connection)
    projects = sorted(_projects(connection, month))
    rows = []
    for project in projects:
        if lines := _lines(connection, project, month, prices):
            text = document(project, month, prices.currency, lines, closed_unix_s=int(now_unix_s))
            digest = sha256_of(text)
            one = {"project": project, "month": month, "closed_unix_s": int(now_unix_s)}
            rows.append(one | {"sha256": digest, "document": text})
    insert_new(connection, invoice, rows)
    set_mark(connection, _CLOSED, int(month.replace("-", "")))
    return len(rows)


def due_months(connection: Connection, now_unix_s: float, close_after_days: int) -> list[str]:
    """Months that can be closed now, oldest first: they are over for long enough, and their sums are made."""
    months = []
    month = _first_open(connection)
    while month and month_bounds(month)[1] + close_after_days * DAY_S <= now_unix_s:
        end = month_bounds(month)[1]
        hour = dirty_hour.c.hour_unix_s
        if connection.execute(select(hour).where(hour < end).limit(1)).first():
            break
        months.append(month)
        month = month_of(end)
    return months


class InvoiceCloser:
    """Closes months when they are due."""

    def __init__(
        self, database: Database, close_after_days: int, *, now_unix_s: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._close_after_days = close_after_days
        self._now_unix_s = now_unix_s

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            try:
                await self.close_due()
            except DatabaseAwayError as error:
                log.warning("months cannot be closed at present; tried again", extra={"error": str(error)})
            await asyncio.sleep(CHECK_S)

    async def close_due(self) -> list[str]:
        """Closes what is due and returns the months. Raises DatabaseAwayError."""
        now_s = self._now_unix_s()
        due = await self._database.read(lambda connection: due_months(connection, now_s, self._close_after_days))
        for month in due:
            count = await self._database.write(lambda connection, month=month: close_month(connection, month, now_s))  # type: ignore[misc]  # the default argument
            log.info("closed the month %s with %d invoices", month, count)
        return due


def _lines(connection: Connection, project: str, month: str, prices: PriceList) -> list[Line]:
    lines = _present(connection, project, month, prices)
    closed = closed_through(connection)
    earlier = [one for one in _months_before(month) if one <= closed]
    if earlier:
        documents = connection.execute(
            select(invoice.c.document).where(invoice.c.project == project, invoice.c.month >= earlier[0])
        )
        invoiced = [line for (text,) in documents for line in lines_in(text)]
        for one in earlier:
            lines += late_lines(one, _present(connection, project, one, prices), invoiced, prices.currency)
    return lines + [correction_line(found) for found in corrections_of(connection, project, month)]


def _present(connection: Connection, project: str, month: str, prices: PriceList) -> list[Line]:
    return lines_of(project, month, _used(connection, project, month, prices), prices)


def _used(connection: Connection, project: str, month: str, prices: PriceList) -> Iterator[Used]:
    start, end = month_bounds(month)
    day = model_day.c.day_unix_s
    counts = {
        LineItem.PROMPT: model_day.c.billed_prompt_tokens,
        LineItem.CACHED: model_day.c.billed_cached_tokens,
        LineItem.COMPLETION: model_day.c.billed_completion_tokens,
        LineItem.REQUEST: model_day.c.requests,
    }
    query = (
        select(day, model_day.c.model, model_day.c.base, *(func.sum(column) for column in counts.values()))
        .where(model_day.c.project == project, day >= start, day < end)
        .where(model_day.c.outcome.in_([outcome.value for outcome in BILLED]))
        .group_by(day, model_day.c.model, model_day.c.base)
    )
    for day_s, model, base, *found in connection.execute(query):
        for item, quantity in zip(counts, found, strict=True):
            yield Used(day_s, model, base, item, int(quantity))
    if any(price.item is LineItem.RESIDENCY for price in prices.prices):
        yield from _residency(connection, project, start, end)


def _residency(connection: Connection, project: str, start: int, end: int) -> Iterator[Used]:
    """What the project's adapters occupied. Byte nanoseconds may exceed 64 bits, so they are added up here."""
    day, model = pod_day.c.day_unix_s, pod_day.c.model
    query = (
        select(day, model, boot.c.base, pod_day.c.byte_ns)
        .join(boot, boot.c.id == pod_day.c.boot)
        .where(day >= start, day < end, pod_day.c.uid.not_in(["", "*"]))
        .where(model >= f"{project}/", model < f"{project}0")  # "0" follows "/": a range, which needs no escaping
    )
    sums: dict[tuple[int, str, str], int] = defaultdict(int)
    for day_s, name, base, byte_ns in connection.execute(query):
        sums[day_s, name, base] += int(byte_ns)
    for (day_s, name, base), quantity in sorted(sums.items()):
        yield Used(day_s, name, base, LineItem.RESIDENCY, quantity)


def _projects(connection: Connection, month: str) -> set[str]:
    """All that have something to invoice in this month, late usage of the months before included."""
    start, end = month_bounds(month)
    first = month_bounds(_months_before(month)[0])[0]
    day, at = model_day.c.day_unix_s, correction.c.recorded_unix_s
    found = set(connection.execute(select(model_day.c.project).distinct().where(day >= first, day < end)).scalars())
    found |= set(connection.execute(select(correction.c.project).distinct().where(at >= start, at < end)).scalars())
    models = select(pod_day.c.model).distinct().where(pod_day.c.day_unix_s >= first, pod_day.c.day_unix_s < end)
    models = models.where(pod_day.c.uid.not_in(["", "*"]))
    found |= {model.partition("/")[0] for model in connection.execute(models).scalars()}
    return found - {""}


def _first_open(connection: Connection) -> str:
    if closed := closed_through(connection):
        return month_of(month_bounds(closed)[1])
    firsts = (func.min(model_day.c.day_unix_s), func.min(pod_day.c.day_unix_s), func.min(correction.c.recorded_unix_s))
    found = [connection.execute(select(first)).scalar() for first in firsts]
    known = [one for one in found if one is not None]
    return month_of(min(known)) if known else ""


def _months_before(month: str) -> list[str]:
    months = [month]
    for _ in range(LATE_MONTHS):
        months.insert(0, month_of(month_bounds(months[0])[0] - 1))
    return months[:-1]
