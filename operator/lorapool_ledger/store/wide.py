"""Sums of `tables.Wide` columns: whole numbers in decimal text, which together may exceed 64 bits."""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, ColumnElement, case, cast, func

_SPLIT = 12
_HIGH: int = 10**_SPLIT


def exact_sums(column: ColumnElement[Any]) -> tuple[ColumnElement[int], ColumnElement[int]]:
    """Two sums, for `exact`, that each have 64 bits."""
    length, whole = func.length(column), cast(column, BigInteger)
    high = case((length > _SPLIT, cast(func.substr(column, 1, length - _SPLIT), BigInteger)), else_=cast(0, BigInteger))
    low = case((length > _SPLIT, cast(func.substr(column, length - _SPLIT + 1), BigInteger)), else_=whole)
    return func.sum(high), func.sum(low)


def exact(high: Any, low: Any) -> int:
    """The sum whose two parts `exact_sums` selected."""
    return int(high or 0) * _HIGH + int(low or 0)
