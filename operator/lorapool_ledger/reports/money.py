"""Amounts and numbers as text. Pure. Amounts are exact; only what people read is rounded."""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Decimal, localcontext

PLACES = 12
"""Digits after the point of an amount for programs: prices have fewer, only residency is rounded at all."""


def plain(amount: Decimal, places: int = PLACES) -> str:
    """The decimal number without an exponent and trailing zeros, rounded to `places` digits after the point."""
    with localcontext(prec=80):
        rounded = amount.quantize(Decimal(1).scaleb(-places), rounding=ROUND_HALF_EVEN)
    text = f"{rounded:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
