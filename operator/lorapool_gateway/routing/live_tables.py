"""The current route table and key table: one owner publishes, all others read, and a change wakes waiting tasks.

Tables are immutable, so a reader never sees a partial change and needs no lock.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from lorapool_gateway.routing.auth import NO_KEYS, KeyTable
from lorapool_gateway.routing.routes import RouteTable


class RouteSource(Protocol):
    @property
    def table(self) -> RouteTable: ...

    async def changed(self, known: RouteTable, timeout_s: float) -> None:
        """Returns as soon as the table is not `known`, and after timeout_s at the latest."""


class KeySource(Protocol):
    @property
    def table(self) -> KeyTable: ...


class LiveRoutes:
    def __init__(self, table: RouteTable | None = None) -> None:
        self._table = table or RouteTable()
        self._next = asyncio.Event()

    @property
    def table(self) -> RouteTable:
        return self._table

    def publish(self, table: RouteTable) -> None:
        self._table = table
        waiters, self._next = self._next, asyncio.Event()
        waiters.set()

    async def changed(self, known: RouteTable, timeout_s: float) -> None:
        if self._table is not known or timeout_s <= 0:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._next.wait()
        except TimeoutError:
            return


class LiveKeys:
    def __init__(self, table: KeyTable = NO_KEYS) -> None:
        self._table = table

    @property
    def table(self) -> KeyTable:
        return self._table

    def publish(self, table: KeyTable) -> None:
        self._table = table
