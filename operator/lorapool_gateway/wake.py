"""Scales a sleeping base from 0 to 1 for a held request: one flight per base, a bounded number of attempts.

Called by dispatch, which asks again whenever a held request looks at the table; so a wake that failed is
repeated for as long as somebody waits, and a base that nobody waits for is left alone. Never scales down.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol

from lorapool_gateway.objects import BaseRoute, ObjectRef

log = logging.getLogger(__name__)

ATTEMPTS = 5
BACKOFF_S = (0.1, 0.3, 1.0, 2.0)
SETTLE_S = 3.0
"""After a success nobody asks again for this long: the watch needs a moment to show the new count."""


class WakeResult(StrEnum):
    WOKEN = "woken"
    ALREADY_UP = "already_up"
    CONFLICT = "conflict"
    FAILED = "failed"


class Waker(Protocol):
    def wake(self, base: BaseRoute) -> None:
        """Starts, if none is under way, the scaling of this base from zero. Returns at once."""


class ScaleClient(Protocol):
    async def scale_from_zero(self, ref: ObjectRef) -> WakeResult:
        """Writes 1 where the count is 0; CONFLICT when somebody else wrote meanwhile. Raises on failure."""


class ScaleWaker:
    def __init__(self, scale: ScaleClient, count: Callable[[str, str], None], settle_s: float = SETTLE_S) -> None:
        self._scale = scale
        self._count = count
        self._settle_s = settle_s
        self._flights: dict[str, asyncio.Task[None]] = {}

    def wake(self, base: BaseRoute) -> None:
        if base.desired_replicas > 0 or base.uid in self._flights:
            return
        task = asyncio.create_task(self._fly(base), name=f"wake {base.ref}")
        self._flights[base.uid] = task
        task.add_done_callback(lambda _: self._flights.pop(base.uid, None))

    async def close(self) -> None:
        flights = list(self._flights.values())
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)

    async def _fly(self, base: BaseRoute) -> None:
        for attempt in range(ATTEMPTS):
            result = await self._attempt(base)
            if result in (WakeResult.WOKEN, WakeResult.ALREADY_UP):
                self._count(str(base.ref), result)
                await asyncio.sleep(self._settle_s)
                return
            if attempt < len(BACKOFF_S):
                await asyncio.sleep(BACKOFF_S[attempt] * random.uniform(0.5, 1.5))
        self._count(str(base.ref), WakeResult.FAILED)

    async def _attempt(self, base: BaseRoute) -> WakeResult:
        try:
            result = await self._scale.scale_from_zero(base.ref)
        except Exception as error:
            log.warning("cannot wake base", extra={"base": str(base.ref), "error": repr(error)})
            return WakeResult.FAILED
        if result is WakeResult.WOKEN:
            log.info("woke base", extra={"base": str(base.ref)})
        return result
