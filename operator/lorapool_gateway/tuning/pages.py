"""Lists in pages, as OpenAI's clients ask for them: `after`, `limit`, `order`. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from lorapool_api.openai import InvalidRequestError

T = TypeVar("T")


def limit_of(query: Mapping[str, str], *, default: int, most: int) -> int:
    """The number of items that are wanted. Raises InvalidRequestError."""
    text = query.get("limit", str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= most:
        raise InvalidRequestError(f"limit must be a number from 1 to {most}.", param="limit")
    return int(text)


def page(
    items: Sequence[T], query: Mapping[str, str], id_of: Callable[[T], str], *, default: int, most: int
) -> tuple[list[T], bool]:
    """The items behind the one whose id is `after`, and whether more follow. Raises InvalidRequestError."""
    limit, after = limit_of(query, default=default, most=most), query.get("after")
    start = 0
    if after:
        start = next((number + 1 for number, item in enumerate(items) if id_of(item) == after), -1)
        if start < 0:
            raise InvalidRequestError(f"after: there is no {after[:80]!r} in this list.", param="after")
    return list(items[start : start + limit]), len(items) > start + limit


def listed(data: Sequence[Mapping[str, Any]], has_more: bool) -> dict[str, Any]:
    """The body of a list."""
    return {
        "object": "list",
        "data": list(data),
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
