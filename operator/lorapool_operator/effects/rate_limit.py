"""How fast one client sends requests to the API server: a number per second, with bursts, as Kubernetes clients do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class RateLimit:
    """Belongs to one event loop. Requests pass in the order in which they asked."""

    def __init__(
        self,
        per_second: float = float("inf"),
        burst: int = 1,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`burst` requests may be sent at once after a quiet time."""
        self._interval_s = 1.0 / per_second
        self._burst_s = (burst - 1) * self._interval_s
        self._clock = clock
        self._sleep = sleep
        self._next_s = 0.0
        """When the next request would be sent if there were no bursts."""
        self._paused_until_s = 0.0

    async def acquire(self) -> None:
        """Returns when one more request may be sent."""
        due_s = max(self._next_s, self._clock())
        self._next_s = due_s + self._interval_s
        while (wait_s := max(due_s - self._burst_s, self._paused_until_s) - self._clock()) > 0:
            await self._sleep(wait_s)

    def pause(self, seconds: float) -> None:
        """Sends nothing for this long, since the server asked for it."""
        self._paused_until_s = max(self._paused_until_s, self._clock() + seconds)
