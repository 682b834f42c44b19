"""Price lists: what tenants pay, and what pods cost. Parsing, the rule that a price in effect never changes, look-up.

A list is YAML with `prices` and `pods` (docs/how-to/bill-tenants.md). A price takes effect at the start of a UTC day,
so that the daily sums decide every amount. `intake.price_list` reads and records lists; everything that computes an
amount looks prices up. Pure.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation, localcontext
from enum import StrEnum
from typing import Any

import yaml

from lorapool_api.currency import is_currency

DAY_S = 86400
GIB_HOUR_BYTE_NS = 2**30 * 3600 * 10**9
"""Byte nanoseconds of one GiB hour."""
MAX_DECIMALS = 12
MAX_AMOUNT = Decimal(10**12)
ALL = "*"
"""The scope of every model, and the profile of every pod."""

_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SCOPE = re.compile(rf"\*|{_NAME}/({_NAME}(\.{_NAME})*)?")


class LineItem(StrEnum):
    """What is paid for."""

    PROMPT = "prompt"
    """Prompt tokens that were not cached, per million."""
    CACHED = "cached"
    """Cached prompt tokens, per million. Without a price of their own they cost as much as the others."""
    COMPLETION = "completion"
    """Generated tokens, per million."""
    REQUEST = "request"
    """Each billed request."""
    RESIDENCY = "residency"
    """Memory of the device that an adapter occupies, per GiB hour."""
    POD = "pod"
    """What an hour of a runtime pod costs the provider. Its scope is the profile."""


UNITS: Mapping[LineItem, tuple[str, int]] = {
    LineItem.PROMPT: ("tokens", 10**6),
    LineItem.CACHED: ("tokens", 10**6),
    LineItem.COMPLETION: ("tokens", 10**6),
    LineItem.REQUEST: ("requests", 1),
    LineItem.RESIDENCY: ("gibibyte_hours", GIB_HOUR_BYTE_NS),
    LineItem.POD: ("hours", 3600 * 10**9),
}
"""The unit in which a quantity is shown, and how many of what is counted (tokens, byte ns, ns) one price is for."""

_FIELDS = {
    "promptPerMillion": LineItem.PROMPT,
    "cachedPerMillion": LineItem.CACHED,
    "completionPerMillion": LineItem.COMPLETION,
    "residencyPerGiBHour": LineItem.RESIDENCY,
    "requestEach": LineItem.REQUEST,
}


class PriceListError(ValueError):
    """A list cannot be used. `lines` has one sentence per mistake."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


@dataclass(frozen=True, slots=True, order=True)
class Price:
    """One price, valid from a day on until the next one of the same scope and item."""

    effective_unix_s: int
    scope: str
    """`*`, a project's `namespace/`, `namespace/name` of a base or an adapter; a profile for LineItem.POD."""
    item: LineItem
    amount: Decimal
    currency: str

    @property
    def key(self) -> tuple[int, str, LineItem]:
        return self.effective_unix_s, self.scope, self.item

    def __str__(self) -> str:
        return f"{self.item} of {self.scope} from {day_text(self.effective_unix_s)}"


class PriceList:
    """The prices that are in effect or announced, for look-ups."""

    def __init__(self, prices: Iterable[Price] = ()) -> None:
        self.prices = tuple(sorted(prices))
        self._found: dict[tuple[str, LineItem], tuple[list[int], list[Price]]] = {}
        for price in self.prices:
            days, listed = self._found.setdefault((price.scope, price.item), ([], []))
            days.append(price.effective_unix_s)
            listed.append(price)

    @property
    def currency(self) -> str:
        """The one currency of all prices; empty when there are none."""
        return self.prices[0].currency if self.prices else ""

    def price(self, item: LineItem, at_unix_s: int, *, project: str, model: str, base: str) -> Price | None:
        """The price of an item at a time: that of the adapter, else of the project, else of the base, else of all."""
        for scope in (model, f"{project}/", base, ALL):
            if found := self._at(scope, item, at_unix_s):
                return found
        if item is LineItem.CACHED:
            return self.price(LineItem.PROMPT, at_unix_s, project=project, model=model, base=base)
        return None

    def pod_price(self, profile: str, at_unix_s: int) -> Price | None:
        """What an hour of a pod of this profile costs."""
        return self._at(profile, LineItem.POD, at_unix_s) or self._at(ALL, LineItem.POD, at_unix_s)

    def _at(self, scope: str, item: LineItem, at_unix_s: int) -> Price | None:
        days, listed = self._found.get((scope, item), ((), ()))
        place = bisect_right(days, at_unix_s)
        return listed[place - 1] if place else None


def amount_of(item: LineItem, quantity: int, amount: Decimal) -> Decimal:
    """Quantity (tokens, requests, byte nanoseconds or nanoseconds) times price: exact, but for a division by hours."""
    with localcontext(prec=60):
        return quantity * amount / UNITS[item][1]


def day_text(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).date().isoformat()


# --- a list's text -----------------------------------------------------------------------


def parse_prices(text: str) -> tuple[Price, ...]:
    """Reads a list. Raises PriceListError with a sentence for each mistake."""
    mistakes: list[str] = []
    prices = tuple(_read(text, mistakes))
    seen: dict[tuple[int, str, LineItem], Price] = {}
    for price in prices:
        if price.key in seen:
            mistakes.append(f"two entries overlap: {price} is listed twice; remove one of them")
        seen[price.key] = price
    if len(currencies := sorted({price.currency for price in prices})) > 1:
        mistakes.append(f"the list has several currencies ({', '.join(currencies)}); one ledger bills in one")
    if mistakes:
        raise PriceListError(mistakes)
    return tuple(sorted(prices))


def _read(text: str, mistakes: list[str]) -> Iterator[Price]:
    try:
        # BaseLoader makes no objects but text, lists and mappings: 0.10 stays what was written.
        found = yaml.load(text, yaml.BaseLoader) or {}  # noqa: S506  # safer than safe_load
    except yaml.YAMLError as error:
        mistakes.append(f"the list is not YAML: {' '.join(str(error).split())}")
        return
    if not isinstance(found, dict):
        mistakes.append("the list has to be a mapping with `prices` and `pods`")
        return
    mistakes += [f"{key} is unknown; a list has `prices` and `pods`" for key in found.keys() - {"prices", "pods"}]
    for kind in ("prices", "pods"):
        entries = found.get(kind) or []
        if not isinstance(entries, list):
            mistakes.append(f"{kind} has to be a list of entries")
            continue
        for number, entry in enumerate(entries):
            where = f"{kind}[{number}]"
            if isinstance(entry, dict):
                yield from _entry(where, entry, mistakes, pods=kind == "pods")
            else:
                mistakes.append(f"{where} has to be a mapping")


def _entry(where: str, entry: dict[str, Any], mistakes: list[str], *, pods: bool) -> Iterator[Price]:
    items = {"podPerHour": LineItem.POD} if pods else _FIELDS
    name = "profile" if pods else "scope"
    known = {"effectiveFrom", name, "currency", *items}
    before = len(mistakes)
    mistakes += [f"{where}.{key} is unknown; known are {', '.join(sorted(known))}" for key in entry.keys() - known]
    mistakes += [f"{where}.{key} is missing" for key in ("effectiveFrom", name, "currency") if not entry.get(key)]
    priced = [key for key in items if key in entry]
    if not priced:
        mistakes.append(f"{where} has no price; it needs one of {', '.join(items)}")
    scope, currency = str(entry.get(name, "")), str(entry.get("currency", ""))
    if scope and not pods and not _SCOPE.fullmatch(scope):
        mistakes.append(f"{where}.scope {scope!r} has to be *, a `namespace/`, or the `namespace/name` of a model")
    if currency and not is_currency(currency):
        mistakes.append(f"{where}.currency {currency!r} is unknown; write a code of ISO 4217 such as EUR")
    effective = _day(f"{where}.effectiveFrom", entry.get("effectiveFrom"), mistakes)
    amounts = {key: _amount(f"{where}.{key}", entry[key], mistakes) for key in priced}
    if len(mistakes) == before:
        for key, amount in amounts.items():
            yield Price(effective, scope, items[key], amount, currency)


def _day(where: str, value: object, mistakes: list[str]) -> int:
    if not value:
        return 0
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError as error:
        mistakes.append(f"{where} {value!r} is no day of the calendar ({error}); write 2027-01-01")
        return 0
    if found.tzinfo is None:
        if len(str(value)) > len("2027-01-01"):
            mistakes.append(f"{where} {value!r} has no time zone; write 2027-01-01 or 2027-01-01T00:00:00Z")
            return 0
        found = found.replace(tzinfo=UTC)
    unix_s = int(found.timestamp())
    if unix_s % DAY_S or found.microsecond:
        mistakes.append(f"{where} {value!r} is within a day; prices take effect at the start of a day in UTC")
    return unix_s


def _amount(where: str, value: object, mistakes: list[str]) -> Decimal:
    try:
        amount = Decimal(str(value)) if isinstance(value, str) else Decimal("NaN")
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        mistakes.append(f"{where} {value!r} is no number; write a decimal such as 0.25")
    elif amount < 0:
        mistakes.append(f"{where} {value} is negative; refunds are corrections (lorapool-ledger correct)")
    elif amount >= MAX_AMOUNT or int(amount.as_tuple().exponent) < -MAX_DECIMALS:
        mistakes.append(f"{where} {value} has to be below {MAX_AMOUNT} with at most {MAX_DECIMALS} decimals")
    else:
        return amount
    return Decimal(0)


# --- a new list against what is recorded -------------------------------------------------


def newly_effective(recorded: Iterable[Price], listed: Iterable[Price], now_unix_s: float) -> tuple[Price, ...]:
    """The entries of a list that are in effect and not recorded yet.

    Announced entries, of days to come, may still change. Raises PriceListError when the list changes or lacks what is
    recorded, or has a new price for a day that is over: whole bills would change with it. The first list of a ledger
    may begin in the past.
    """
    by_key, wanted = {price.key: price for price in recorded}, {price.key: price for price in listed}
    today_s = int(now_unix_s) // DAY_S * DAY_S
    first = {pods: not any((item is LineItem.POD) is pods for _, _, item in by_key) for pods in (True, False)}
    mistakes: list[str] = []
    for key, price in by_key.items():
        if key not in wanted:
            mistakes.append(
                f"the price {price} is missing, although it is in effect: put it back "
                f"({price.amount} {price.currency}), and add a new entry for a later day to change it"
            )
        elif wanted[key].amount != price.amount or wanted[key].currency != price.currency:
            mistakes.append(
                f"the price {price} was changed from {price.amount} {price.currency} to {wanted[key].amount} "
                f"{wanted[key].currency}, although it is in effect: change it back, and add a new entry for a later day"
            )
    found = [
        price for key, price in sorted(wanted.items()) if key not in by_key and price.effective_unix_s <= now_unix_s
    ]
    mistakes += [
        f"the price {price} is new and for a day that is over: let it take effect on {day_text(today_s)} or later, and "
        "enter what is due for earlier days as a correction (lorapool-ledger correct)"
        for price in found
        if price.effective_unix_s < today_s and not first[price.item is LineItem.POD]
    ]
    currencies = {price.currency for price in by_key.values()}
    if others := sorted({price.currency for price in wanted.values()} - currencies) if currencies else []:
        mistakes.append(f"the ledger bills in {', '.join(currencies)} and cannot change to {', '.join(others)}")
    if mistakes:
        raise PriceListError(mistakes)
    return tuple(found)
