"""Where the present tables lie: one owner writes, everyone reads, and those who wait are woken by a change.

Written by watch (or by a test), read by app and dispatch. Tables are frozen, so a reader never sees half a
change and needs no lock.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from lorapool_gateway.auth import NO_KEYS, KeyTable
from lorapool_gateway.routes import RouteTable


class RouteSource(Protocol):
    @property
    def table(self) -> RouteTable: ...

    async def changed(self, seen: RouteTable, timeout_s: float) -> None:
        """Returns as soon as the table is not `seen`, and after timeout_s at the latest."""


class KeySource(Protocol):
    @property
    def table(self) -> KeyTable: ...


class RouteStore:
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

    async def changed(self, seen: RouteTable, timeout_s: float) -> None:
        if self._table is not seen or timeout_s <= 0:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._next.wait()
        except TimeoutError:
            return


class KeyStore:
    def __init__(self, table: KeyTable = NO_KEYS) -> None:
        self._table = table

    @property
    def table(self) -> KeyTable:
        return self._table

    def publish(self, table: KeyTable) -> None:
        self._table = table
