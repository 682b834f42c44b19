"""The JSON merge patch (RFC 7386) that turns one status into another. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Only what differs; null for what is gone; lists whole."""
    patch: dict[str, Any] = {name: None for name in before if name not in after}
    for name, value in after.items():
        held = before.get(name)
        if name in before and held == value:
            continue
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            patch[name] = merge_patch(held, value)
        else:
            patch[name] = value
    return patch
