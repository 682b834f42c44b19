"""Permits for work that several tenants compete for, such that the hanging work of one does not stop the others.

A tenant gets a further permit only while it has fewer than are free. One tenant alone thus uses half of all permits, a
second one half of the rest, and so on: a permit is left for the next tenant. Of those that wait, the tenant with the
fewest permits comes first, then the one that asked first.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairPermits:
    """Belongs to one event loop."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def permit(self, tenant: str) -> AsyncIterator[None]:
        """Holds one permit while inside."""
        await self._acquire(tenant)
        try:
            yield
        finally:
            self._give_back(tenant)

    async def _acquire(self, tenant: str) -> None:
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(granted)
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._give_back(tenant)
            else:
                self._drop(tenant, granted)
            raise

    def _give_back(self, tenant: str) -> None:
        self._free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        self._grant()

    def _grant(self) -> None:
        while (tenant := self._next()) is not None:
            granted = self._waiting[tenant].popleft()
            if not self._waiting[tenant]:
                del self._waiting[tenant]
            self._free -= 1
            self._held[tenant] += 1
            granted.set_result(None)

    def _next(self) -> str | None:
        """The waiting tenant that gets the next permit; None if none may have one now."""
        allowed = [tenant for tenant in self._waiting if self._held[tenant] < self._free]
        return min(allowed, key=lambda tenant: self._held[tenant], default=None)

    def _drop(self, tenant: str, granted: asyncio.Future[None]) -> None:
        waiting = self._waiting[tenant]
        waiting.remove(granted)
        if not waiting:
            del self._waiting[tenant]
