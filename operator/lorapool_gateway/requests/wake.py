"""Scales a base up for held requests: from zero, and further while none of its replicas serves yet.

The operator sees the load only once a replica reports it. So that a burst on a base without a replica does not wait for
two cold starts in a row, the gateway asks for as many replicas as its own held requests fill. Each gateway adds its
share to the number that it reads, so the shares of several gateways add up.

A held request asks for the wake each time it looks at the table. A failed wake is therefore repeated for as long as a
request waits, and a base without waiting requests is left alone. There is at most one call per base at a time. Nothing
here scales down.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

from lorapool_api.basemodel import ScalingMode
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
    def wake(self, base: BaseRoute, held: int) -> None:
        """Starts to scale this base up for `held` requests unless that is under way. Returns at once."""


class ScaleWaker:
    def __init__(self, scale: ScaleClient, count: Callable[[str, str], None], settle_s: float = SETTLE_S) -> None:
        self._scale = scale
        self._count = count
        self._settle_s = settle_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._shares: dict[str, int] = {}
        """By base uid: the part of the desired replicas that this gateway asked for."""

    def wake(self, base: BaseRoute, held: int) -> None:
        if base.uid in self._tasks:
            return
        share = min(self._shares.get(base.uid, 0), base.desired_replicas)
        add = more_replicas(base, held, share)
        if base.desired_replicas > 0 and add == 0:
            return
        task = asyncio.create_task(self._scale_up(base, add, share), name=f"wake {base.ref}")
        self._tasks[base.uid] = task
        task.add_done_callback(lambda _: self._tasks.pop(base.uid, None))

    @property
    def busy(self) -> bool:
        """True while a call is under way or settles."""
        return bool(self._tasks)

    async def close(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _scale_up(self, base: BaseRoute, add: int, share: int) -> None:
        for attempt in range(ATTEMPTS):
            result = await self._attempt(base, add)
            if result in (ScaleResult.WOKEN, ScaleResult.ALREADY_UP):
                self._shares[base.uid] = share + max(1, add) if result is ScaleResult.WOKEN else share
                self._count(str(base.ref), result)
                await asyncio.sleep(self._settle_s)
                return
            if attempt < len(BACKOFF_S):
                await asyncio.sleep(BACKOFF_S[attempt] * random.uniform(0.5, 1.5))
        self._count(str(base.ref), FAILED)

    async def _attempt(self, base: BaseRoute, add: int) -> ScaleResult | None:
        try:
            result = await self._scale.scale_up(base.ref, add, base.spec.scaling.max_replicas)
        except Exception as error:
            log.warning("cannot wake base", extra={"base": str(base.ref), "error": repr(error)})
            return None
        if result is ScaleResult.WOKEN:
            log.info("woke base", extra={"base": str(base.ref)})
        return result


def more_replicas(base: BaseRoute, held: int, share: int) -> int:
    """Returns how many replicas more this gateway's held requests would fill, beyond the share it has asked for.

    Partly filled replicas do not count, so that a few requests at each of several gateways start one replica.
    """
    scaling = base.spec.scaling
    if scaling.mode is ScalingMode.EXTERNAL or base.desired_replicas >= scaling.max_replicas:
        return 0
    return max(0, min(held // scaling.target_in_flight, scaling.max_replicas) - share)
