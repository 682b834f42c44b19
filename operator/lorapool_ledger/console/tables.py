"""The console's exports: CSV of what a key may see, and invoices. Amounts are exact, and no cell is a formula."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection

from lorapool_ledger.console.pages import NoSuchPageError, View
from lorapool_ledger.reports.charges import API_UNITS, Dimension, charges
from lorapool_ledger.reports.health import key_names
from lorapool_ledger.reports.invoices import invoice_csv, invoice_html
from lorapool_ledger.reports.money import plain
from lorapool_ledger.reports.periods import Width, day_text, month
from lorapool_ledger.reports.usage import By, usage
from lorapool_ledger.sums.invoices import invoice_of

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
NAMES_AT_ONCE = 5000
NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def guarded(value: object) -> object:
    """A text that a spreadsheet would take for a formula gets an apostrophe in front. Numbers stay numbers."""
    if isinstance(value, str) and value.startswith(FORMULA):
        return "'" + value
    return value


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    made = io.StringIO()
    writer = csv.writer(made, lineterminator="\r\n")
    writer.writerow(header)
    writer.writerows([guarded(value) for value in row] for row in rows)
    return made.getvalue()


def usage_table(connection: Connection, view: View) -> str:
    """Billed usage by day, project, key and model."""
    rows = usage(connection, view.scope, view.period, Width.DAY, [By.PROJECT, By.KEY, By.MODEL])
    names: dict[str, str] = {}
    uids = sorted({row.group[1] for row in rows})
    for start in range(0, len(uids), NAMES_AT_ONCE):
        names |= key_names(connection, uids[start : start + NAMES_AT_ONCE])
    header = (
        *("day", "project", "api_key_id", "api_key", "model", "requests"),
        *("input_tokens", "input_cached_tokens", "output_tokens"),
    )
    return csv_text(
        header,
        (
            (
                *(day_text(row.start_unix_s), row.group[0], row.group[1], names.get(row.group[1], ""), row.group[2]),
                *(row.requests, row.input_tokens, row.cached_tokens, row.completion_tokens),
            )
            for row in rows
        ),
    )


def costs_table(connection: Connection, view: View) -> str:
    """Costs by day, project, model and line item."""
    by = [Dimension.DAY, Dimension.PROJECT, Dimension.MODEL, Dimension.ITEM]
    header = ("day", "project", "model", "line_item", "quantity", "unit", "amount", "currency")
    return csv_text(
        header,
        (
            (
                *(day_text(item.day_unix_s), item.project, item.model, item.line_item.rpartition(", ")[2]),
                *(_Number(plain(item.quantity)), API_UNITS[item.item] or "requests"),
                *(_Number(plain(item.amount)), item.currency),
            )
            for item in charges(connection, view.scope, view.period, by)
        ),
    )


class _Number:
    """A number as text, which keeps its sign."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


TABLES: dict[str, Callable[[Connection, View], Any]] = {
    "/usage.csv": usage_table,
    "/costs.csv": costs_table,
}

INVOICES: dict[str, Callable[[str], str]] = {"html": invoice_html, "csv": invoice_csv}
"""The forms of an invoice, by the ending of its path."""


def invoice(connection: Connection, view: View, project: str, month_name: str, form: str) -> str:
    """A project's invoice of a month: the closed one, or what the month comes to now. Raises NoSuchPageError.

    A key that may see only some models of the project, or only its own requests, has no view of the whole invoice.
    """
    scope = view.scope
    whole = scope.keys is None and scope.models is None and scope.permits_project(project)
    if form not in INVOICES or month(month_name) is None or not NAMESPACE.fullmatch(project) or not whole:
        raise NoSuchPageError
    return INVOICES[form](invoice_of(connection, project, month_name))
