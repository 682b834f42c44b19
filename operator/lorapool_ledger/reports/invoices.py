"""Invoices for people: HTML and CSV, made from their documents alone."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from lorapool_ledger.billing.invoice import Line, lines_in, sha256_of
from lorapool_ledger.billing.prices import UNITS, LineItem

COLUMNS = ("invoice", "month", "model", "item", "quantity", "unit", "unit_price", "amount", "currency", "text")
ITEMS = {
    "prompt": "prompt tokens",
    "cached": "cached prompt tokens",
    "completion": "completion tokens",
    "request": "requests",
    "residency": "adapter memory",
    "correction": "correction",
}


def invoice_csv(document: str) -> str:
    """One row for each line, and the total last. No cell can be taken for a formula."""
    found: dict[str, Any] = json.loads(document)
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\r\n")
    rows.writerow(COLUMNS)
    name, currency = found["invoice"], found["currency"]
    for line in lines_in(document):
        cells = (name, line.month, line.model, line.item, _quantity(line), line.unit, line.unit_price)
        rows.writerow([*(guarded(cell) for cell in cells), line.amount, currency, guarded(line.text)])
    rows.writerow([guarded(name), found["month"], "", "total", "", "", "", found["total"], currency, ""])
    return out.getvalue()


def invoice_html(document: str) -> str:
    """A page without scripts. All names are escaped, and isolated from the direction of the text around them."""
    found: dict[str, Any] = json.loads(document)
    lines = [(line, ITEMS.get(line.item, line.item), _quantity(line)) for line in lines_in(document)]
    return _template().render(invoice=found, lines=lines, sha256=sha256_of(document))


def guarded(cell: str) -> str:
    """The text of a cell; what a spreadsheet would take for a formula begins with an apostrophe.

    Numbers of our own, which may be negative, are not passed through here.
    """
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else cell


def _quantity(line: Line) -> str:
    """Tokens and requests as they are; GiB hours with six decimals."""
    if line.item != LineItem.RESIDENCY:
        return str(line.quantity)
    return format((Decimal(line.quantity) / UNITS[LineItem.RESIDENCY][1]).quantize(Decimal("0.000001")), "f")


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("lorapool_ledger", "reports/templates"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("invoice.html")
