"""The bodies of `GET /v1/models`, made once for all keys that see the same models until an object changes.

A list of 5,000 adapters takes tens of milliseconds of the event loop.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from lorapool_gateway.routing.auth import ApiKey
from lorapool_gateway.routing.objects import AdapterRoute, BaseRoute
from lorapool_gateway.routing.routes import Entry, RouteTable

KEPT_LISTS = 16
"""A list of 5,000 adapters takes about 1 MB."""


class ModelLists:
    def __init__(self) -> None:
        self._bases: object = None
        self._adapters: object = None
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        """The least recently used first."""

    def body(self, table: RouteTable, key: ApiKey) -> bytes:
        if self._bases is not table.bases or self._adapters is not table.adapters:
            self._bases, self._adapters = table.bases, table.adapters
            self._kept.clear()
        body = self._kept.pop(key.visibility, None) or _listed(table, key)
        self._kept[key.visibility] = body
        if len(self._kept) > KEPT_LISTS:
            self._kept.popitem(last=False)
        return body


def _listed(table: RouteTable, key: ApiKey) -> bytes:
    data = [model_object(table, entry, name) for entry in table.visible(key) for name in table.names_of(entry, key)]
    return json.dumps({"object": "list", "data": data}).encode()


def model_object(table: RouteTable, entry: Entry, name: str) -> dict[str, Any]:
    """The object under one of its names; `root` is the name that never changes its meaning."""
    model: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": int(entry.created_unix_s),
        "owned_by": entry.ref.namespace,
        "root": str(entry.ref),
    }
    base = entry if isinstance(entry, BaseRoute) else table.bases.get(entry.base_ref)
    if base is not None:
        model["max_model_len"] = base.spec.max_model_len
    if isinstance(entry, AdapterRoute):
        model["parent"] = str(entry.base_ref)
    return model
