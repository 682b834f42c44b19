"""Scales a base from 0 to 1 replica for a held request: at most one call per base at a time, with few retries.

A held request asks for the wake each time it looks at the table. A failed wake is therefore repeated for as long as a
request waits, and a base without waiting requests is left alone. Nothing here scales down.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

from lorapool_gateway.routing.objects import BaseRoute
from lorapool_gateway.routing.source import ScaleClient, ScaleResult

log = logging.getLogger(__name__)

ATTEMPTS = 5
BACKOFF_S = (0.1, 0.3, 1.0, 2.0)
SETTLE_S = 3.0
"""After a success the base is not scaled again for this long: the watch needs a moment to show the new number."""


FAILED = "failed"
"""Label of a wake whose last attempt failed; the others are those of ScaleResult."""


class Waker(Protocol):
    def wake(self, base: BaseRoute) -> None:
        """Starts to scale this base from zero unless that is under way. Returns at once."""


class ScaleWaker:
    def __init__(self, scale: ScaleClient, count: Callable[[str, str], None], settle_s: float = SETTLE_S) -> None:
        self._scale = scale
        self._count = count
        self._settle_s = settle_s
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def wake(self, base: BaseRoute) -> None:
        if base.desired_replicas > 0 or base.uid in self._tasks:
            return
        task = asyncio.create_task(self._scale_up(base), name=f"wake {base.ref}")
        self._tasks[base.uid] = task
        task.add_done_callback(lambda _: self._tasks.pop(base.uid, None))

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _scale_up(self, base: BaseRoute) -> None:
        for attempt in range(ATTEMPTS):
            result = await self._attempt(base)
            if result in (ScaleResult.WOKEN, ScaleResult.ALREADY_UP):
                self._count(str(base.ref), result)
                await asyncio.sleep(self._settle_s)
                return
            if attempt < len(BACKOFF_S):
                await asyncio.sleep(BACKOFF_S[attempt] * random.uniform(0.5, 1.5))
        self._count(str(base.ref), FAILED)

    async def _attempt(self, base: BaseRoute) -> ScaleResult | None:
        try:
            result = await self._scale.scale_from_zero(base.ref)
        except Exception as error:
            log.warning("cannot wake base", extra={"base": str(base.ref), "error": repr(error)})
            return None
        if result is ScaleResult.WOKEN:
            log.info("woke base", extra={"base": str(base.ref)})
        return result
