"""The current route table and key table: one owner publishes, all others read, and are called with a new route table.

Tables are immutable, so a reader never sees a partial change and needs no lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from lorapool_gateway.routing.auth import NO_KEYS, KeyTable
from lorapool_gateway.routing.routes import RouteTable


class RouteSource(Protocol):
    @property
    def table(self) -> RouteTable: ...

    def subscribe(self, on_publish: Callable[[RouteTable], None]) -> None:
        """Calls `on_publish` with every later table."""


class KeySource(Protocol):
    @property
    def table(self) -> KeyTable: ...

    @property
    def confirmed_s(self) -> Callable[[], float]:
        """Returns when the keys were known last to be those of their source, in monotonic time; inf: at any time."""


class LiveRoutes:
    def __init__(self, table: RouteTable | None = None) -> None:
        self._table = table or RouteTable()
        self._subscribers: list[Callable[[RouteTable], None]] = []

    @property
    def table(self) -> RouteTable:
        return self._table

    def publish(self, table: RouteTable) -> None:
        self._table = table
        for on_publish in self._subscribers:
            on_publish(table)

    def subscribe(self, on_publish: Callable[[RouteTable], None]) -> None:
        self._subscribers.append(on_publish)


class LiveKeys:
    def __init__(self, table: KeyTable = NO_KEYS) -> None:
        self._table = table
        self.confirmed_s: Callable[[], float] = lambda: math.inf

    @property
    def table(self) -> KeyTable:
        return self._table

    def publish(self, table: KeyTable) -> None:
        self._table = table
