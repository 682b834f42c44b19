"""Keys to look at, each at most once at a time.

Filled by handlers, resync and requeues; emptied by the workers. A key added while it is being worked on
is worked on once more afterwards; of several due times the earliest wins. A failed key comes back after a
back-off of its own. Holds keys only: what to do is found out when its turn comes.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 30.0


class WorkQueue(Generic[K]):
    """One event loop only; nothing here is thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()
        self._working: set[K] = set()
        self._again: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._changed = asyncio.Event()

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Marks a key dirty, to be looked at in `delay_s` seconds or earlier."""
        self._add_at(key, self._clock() + max(0.0, delay_s))

    async def get(self) -> K:
        """The next due key; the caller owes `done`."""
        while True:
            wait_s = self._next_wait_s()
            if wait_s is not None and wait_s <= 0:
                _, _, key = heapq.heappop(self._heap)
                del self._due[key]
                self._working.add(key)
                return key
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: K, *, failed: bool = False) -> None:
        """Ends the work on a key; a failed one is due again after its back-off."""
        self._working.discard(key)
        again = self._again.pop(key, None)
        if failed:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
            self.add(key, min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(failures, 10)))
        else:
            self._failures.pop(key, None)
            if again is not None:
                self._add_at(key, again)

    def ready_depth(self) -> int:
        """Keys that are due now."""
        now = self._clock()
        return sum(1 for due in self._due.values() if due <= now)

    def oldest_age_s(self) -> float:
        """How long the most overdue key has waited; 0 when none is due."""
        now = self._clock()
        return max(0.0, max((now - due for due in self._due.values()), default=0.0))

    def idle(self) -> bool:
        """Nothing due and nothing under way."""
        return not self._working and self.ready_depth() == 0

    def _add_at(self, key: K, due: float) -> None:
        waiting = self._again if key in self._working else self._due
        if key in waiting and waiting[key] <= due:
            return
        waiting[key] = due
        if waiting is self._due:
            heapq.heappush(self._heap, (due, next(self._order), key))
            self._changed.set()

    def _next_wait_s(self) -> float | None:
        """Seconds until the first key is due; None when only a change can bring one."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) == due:
                return due - self._clock()
            heapq.heappop(self._heap)  # moved to an earlier time, or handed out
        return None
