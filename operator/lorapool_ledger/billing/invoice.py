"""Invoices: the lines of one project and month, and their document. Pure.

A document is JSON in one fixed form, from which HTML and CSV are made (`reports.invoices`). A closed month's document
is stored and never made again. What arrives later for a closed month, and corrections, are lines of the month that is
open then.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from lorapool_api.currency import rounded
from lorapool_ledger.billing.prices import UNITS, LineItem, Price, PriceList, amount_of

VERSION = 1
_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")


@dataclass(frozen=True, slots=True)
class Used:
    """What a project used of one item of one model on one day."""

    day_unix_s: int
    model: str
    """`namespace/name` of the adapter or base."""
    base: str
    """`namespace/name` of the base."""
    item: LineItem
    quantity: int
    """Tokens, requests or byte nanoseconds."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A correction as it was recorded."""

    correction_id: str
    recorded_unix_s: int
    concerns_unix_s: int
    project: str
    model: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    amount: Decimal
    currency: str
    reason: str
    author: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an invoice: a model's item at one price, or a correction."""

    month: str
    """The month in which it was used. Earlier than the invoice's: it arrived after that month was closed."""
    model: str
    item: str
    """A `LineItem`, or `correction`."""
    quantity: int
    """Tokens, requests or byte nanoseconds; of a correction, tokens of all kinds."""
    unit: str
    unit_price: str
    """Of a million tokens, a request or a GiB hour, as decimal text; empty: no price was in effect."""
    amount: str
    """Rounded once, here."""
    text: str = ""
    """Of a correction: its id and reason."""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.month, self.model, self.item, self.unit_price


def month_of(unix_s: float) -> str:
    """The calendar month (UTC), such as 2026-11."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m")


def month_bounds(month: str) -> tuple[int, int]:
    """Start and end of a month in Unix seconds; the end is the start of the next. Raises ValueError in words."""
    if not _MONTH.fullmatch(month) or month[:4] == "0000":
        raise ValueError(f"{month!r} is no month; write one such as 2026-11")
    year, number = int(month[:4]), int(month[5:])
    if year == 9999:
        raise ValueError(f"{month!r} is too far in the future")
    start = datetime(year, number, 1, tzinfo=UTC)
    end = datetime(year + number // 12, number % 12 + 1, 1, tzinfo=UTC)
    return int(start.timestamp()), int(end.timestamp())


def lines_of(project: str, month: str, used: Iterable[Used], prices: PriceList) -> list[Line]:
    """The lines of what a project used in a month: one for each model, item and price."""
    sums: dict[tuple[str, LineItem, Decimal | None], int] = {}
    named: dict[tuple[str, LineItem, Decimal | None], Price | None] = {}
    for one in used:
        price = prices.price(one.item, one.day_unix_s, project=project, model=one.model, base=one.base)
        key = one.model, one.item, price.amount if price else None
        named.setdefault(key, price)
        sums[key] = sums.get(key, 0) + one.quantity
    lines = []
    for key in sorted(sums, key=lambda key: (key[0], _ORDER.index(key[1]), Decimal(-1) if key[2] is None else key[2])):
        price, quantity = named[key], sums[key]
        if quantity and (price is not None or key[1] not in _ONLY_WITH_PRICE):
            lines.append(_line(month, key[0], key[1], price, quantity))
    return lines


_ONLY_WITH_PRICE = (LineItem.REQUEST, LineItem.RESIDENCY)
"""Items that are left out of a bill unless they have a price."""
_ORDER = list(LineItem)


def _line(month: str, model: str, item: LineItem, price: Price | None, quantity: int) -> Line:
    amount = rounded(amount_of(item, quantity, price.amount), price.currency) if price else Decimal(0)
    unit_price = format(price.amount.normalize(), "f") if price else ""
    return Line(month, model, item.value, quantity, UNITS[item][0], unit_price, format(amount, "f"))


def late_lines(month: str, present: Iterable[Line], closed: Iterable[Line], currency: str) -> list[Line]:
    """What a closed month has come to since, compared with all lines that were invoiced for it.

    `present`: the lines of that month by what is known now. `closed`: those of its own invoice and of later ones.
    """
    change: dict[tuple[str, str, str, str], tuple[Line, int]] = {}
    for sign, lines in ((1, present), (-1, closed)):
        for line in lines:
            if line.month == month and line.item != "correction":
                change[line.key] = line, change.get(line.key, (line, 0))[1] + sign * line.quantity
    found = []
    for line, quantity in change.values():
        if quantity:
            amount = Decimal(0)
            if line.unit_price:
                amount = rounded(amount_of(LineItem(line.item), quantity, Decimal(line.unit_price)), currency)
            found.append(Line(*line.key[:3], quantity, line.unit, line.unit_price, format(amount, "f")))
    return sorted(found, key=lambda line: line.key)


def correction_line(correction: Correction) -> Line:
    tokens = correction.prompt_tokens + correction.cached_tokens + correction.completion_tokens
    amount = format(rounded(correction.amount, correction.currency), "f")
    text = f"{correction.correction_id}: {correction.reason}"
    month = month_of(correction.concerns_unix_s)
    return Line(month, correction.model, "correction", tokens, "tokens" if tokens else "", "", amount, text)


def document(project: str, month: str, currency: str, lines: Sequence[Line], *, closed_unix_s: int | None) -> str:
    """The invoice as JSON in one fixed form: the same lines give the same bytes."""
    total = sum((Decimal(line.amount) for line in lines), Decimal(0))
    if currency:
        total = rounded(total, currency)
    found = {
        "version": VERSION,
        "invoice": f"{project}-{month}",
        "project": project,
        "month": month,
        "closed_unix_s": closed_unix_s,
        "currency": currency,
        "lines": [asdict(line) for line in lines],
        "total": format(total, "f"),
    }
    return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lines_in(document: str) -> list[Line]:
    """The lines of a document."""
    found: Mapping[str, Any] = json.loads(document)
    return [Line(**line) for line in found["lines"]]
