"""Corrections: what an operator adds to or takes off a bill, once by its id. Nothing that was recorded is changed.

A correction appears in the month in which it is recorded; in the first open one, if that is closed already.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from sqlalchemy import Connection, func, select

from lorapool_api.currency import is_currency
from lorapool_ledger.billing.invoice import Correction, month_bounds, month_of
from lorapool_ledger.billing.prices import MAX_AMOUNT, MAX_DECIMALS, LineItem, amount_of
from lorapool_ledger.intake.price_list import read_prices
from lorapool_ledger.store.tables import correction, invoice, usage_day
from lorapool_ledger.store.writes import insert_new

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_PROJECT = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TOKENS = ("prompt_tokens", "cached_tokens", "completion_tokens")
MAX_TOKENS = 10**15


class CorrectionError(ValueError):
    """A correction is refused. The message names the remedy."""


@dataclass(frozen=True, slots=True)
class NewCorrection:
    """What an operator enters. Counts and amounts may be negative: a refund takes off."""

    correction_id: str
    """Chosen by who corrects. The same id a second time changes nothing."""
    project: str
    concerns_unix_s: int
    """The time that is corrected."""
    reason: str
    author: str
    model: str = ""
    """`namespace/name`; needed for tokens without an amount, which are priced."""
    key_uid: str = ""
    prompt_tokens: int = 0
    """Without the cached ones."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    amount: Decimal | None = None
    """None: the tokens at the prices of the time that is corrected."""


def record_correction(connection: Connection, new: NewCorrection, now_unix_s: float) -> Correction:
    """Records a correction and returns it as it is in the ledger. Raises CorrectionError.

    An id that is recorded already with the same values is returned as it is; one with other values is refused.
    """
    _check(new, now_unix_s)
    if known := find_correction(connection, new.correction_id):
        if not _same(known, new):
            raise CorrectionError(
                f"{new.correction_id} is recorded with other values; corrections never change: enter a further one "
                "under a new id"
            )
        return known
    amount, currency = _amount(connection, new)
    closed = connection.execute(select(func.max(invoice.c.month)).where(invoice.c.project == new.project)).scalar()
    first_open_s = month_bounds(closed)[1] if closed else 0
    row = {
        "correction_id": new.correction_id,
        "recorded_unix_s": max(int(now_unix_s), first_open_s),
        "concerns_unix_s": new.concerns_unix_s,
        "project": new.project,
        "key_uid": new.key_uid,
        "model": new.model,
        **{name: getattr(new, name) for name in _TOKENS},
        "amount": format(amount, "f"),
        "currency": currency,
        "reason": new.reason,
        "author": new.author,
    }
    insert_new(connection, correction, [row])
    found = find_correction(connection, new.correction_id)
    assert found is not None
    return found


def find_correction(connection: Connection, correction_id: str) -> Correction | None:
    """The correction of this id."""
    row = connection.execute(select(correction).where(correction.c.correction_id == correction_id)).one_or_none()
    return None if row is None else correction_of(row)


def corrections_of(connection: Connection, project: str, month: str) -> list[Correction]:
    """Those that appear in the project's invoice of this month, in the order in which they were recorded."""
    start, end = month_bounds(month)
    at = correction.c.recorded_unix_s
    query = select(correction).where(correction.c.project == project, at >= start, at < end).order_by(correction.c.id)
    return [correction_of(row) for row in connection.execute(query)]


def correction_of(row: object) -> Correction:
    """A row of the table."""
    names = Correction.__dataclass_fields__
    found = {name: getattr(row, name) for name in names}
    return Correction(**found | {"amount": Decimal(found["amount"])})


def _same(known: Correction, new: NewCorrection) -> bool:
    names = ("project", "concerns_unix_s", "model", *_TOKENS, "reason", "author")
    alike = all(getattr(known, name) == getattr(new, name) for name in names)
    return alike and (new.amount is None or new.amount == known.amount)


def _check(new: NewCorrection, now_unix_s: float) -> None:
    if not _ID.fullmatch(new.correction_id):
        raise CorrectionError("the id has to be 1 to 64 letters, digits or . _ : -, such as ticket-4711")
    if not _PROJECT.fullmatch(new.project):
        raise CorrectionError(f"the project {new.project!r} has to be the name of a namespace")
    if not new.reason.strip() or len(new.reason) > 1000:
        raise CorrectionError("the reason has to have 1 to 1000 characters: the tenant reads it")
    if not new.author.strip() or len(new.author) > 253:
        raise CorrectionError("the author has to have 1 to 253 characters")
    if not 0 <= new.concerns_unix_s <= now_unix_s:
        raise CorrectionError("the time that is corrected has to be in the past")
    if any(abs(getattr(new, name)) > MAX_TOKENS for name in _TOKENS):
        raise CorrectionError(f"a correction has at most {MAX_TOKENS} tokens of a kind")
    amount = new.amount
    if amount is not None and not _is_amount(amount):
        raise CorrectionError(f"the amount has to be a decimal with at most {MAX_DECIMALS} decimals, such as -12.50")
    if not amount and not any(getattr(new, name) for name in _TOKENS):
        raise CorrectionError("the correction changes nothing: give an amount or tokens")


def _is_amount(amount: Decimal) -> bool:
    return amount.is_finite() and abs(amount) < MAX_AMOUNT and int(amount.as_tuple().exponent) >= -MAX_DECIMALS


def _amount(connection: Connection, new: NewCorrection) -> tuple[Decimal, str]:
    prices = read_prices(connection)
    currency = prices.currency
    if new.amount is not None:
        if new.amount and not is_currency(currency):
            raise CorrectionError("there is no price list yet, so the amount has no currency: add prices first")
        return new.amount, currency
    query = select(usage_day.c.base).where(usage_day.c.model == new.model, usage_day.c.project == new.project)
    base = connection.execute(query.order_by(usage_day.c.day_unix_s.desc()).limit(1)).scalar()
    if base is None:
        raise CorrectionError(
            f"the project {new.project} has never used {new.model or 'a model of no name'}, so its tokens have no "
            "price: give the model that it used, or an amount"
        )
    total = Decimal(0)
    for item, name in zip((LineItem.PROMPT, LineItem.CACHED, LineItem.COMPLETION), _TOKENS, strict=True):
        if count := getattr(new, name):
            found = prices.price(item, new.concerns_unix_s, project=new.project, model=new.model, base=base)
            if found is None:
                when = month_of(new.concerns_unix_s)
                raise CorrectionError(
                    f"no price for {item} tokens of {new.model} was in effect in {when}: give an amount"
                )
            total += amount_of(item, count, found.amount)
    return total, currency
