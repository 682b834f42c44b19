"""Objects as the tables that `kubectl get` prints: the columns come from the CRDs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from lorapool_api.crd import KINDS
from lorapool_serve.objects import Raw

COLUMNS = {kind.kind: [column for column in kind.columns if column[3] == 0] for kind in KINDS}
_FILTER = re.compile(r'(\w+)\[\?\(@\.(\w+)=="(\w+)"\)\]')


def table(kind: str, raws: Sequence[Raw], now: datetime | None = None) -> str:
    """Header and one line for each object."""
    at = now or datetime.now(UTC)
    rows = [("NAMESPACE", "NAME", *(name for name, *_ in COLUMNS[kind]))]
    for raw in raws:
        cells = [_cell(raw, path, shown_as, at) for _, shown_as, path, _ in COLUMNS[kind]]
        rows.append((raw["metadata"]["namespace"], raw["metadata"]["name"], *cells))
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def state(kind: str, raw: Raw) -> tuple[str, ...]:
    """The cells of an object that do not change by time alone."""
    return tuple(str(value_at(raw, path)) for _, shown_as, path, _ in COLUMNS[kind] if shown_as != "date")


def value_at(raw: Any, path: str) -> Any:
    """The value at a JSONPath of the forms `.a.b` and `.a[?(@.key=="value")].b`; None if there is none."""
    for part in path.strip(".").split(".") if "[" not in path else re.split(r"\.(?![^[]*\])", path.strip(".")):
        if not isinstance(raw, dict):
            return None
        found = _FILTER.fullmatch(part)
        if found is None:
            raw = raw.get(part)
        else:
            raw = next((item for item in raw.get(found[1], []) if item.get(found[2]) == found[3]), None)
    return raw


def _cell(raw: Raw, path: str, shown_as: str, now: datetime) -> str:
    value = value_at(raw, path)
    if value is None:
        return ""
    return _age(value, now) if shown_as == "date" else str(value)


def _age(text: str, now: datetime) -> str:
    seconds = max(0, int((now - datetime.fromisoformat(text)).total_seconds()))
    if seconds < 120:
        return f"{seconds}s"
    return f"{seconds // 60}m" if seconds < 7200 else f"{seconds // 3600}h"
