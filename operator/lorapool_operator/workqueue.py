"""A queue of keys to reconcile, each handed out to at most one worker at a time.

A key that is added while a worker has it is handed out once more afterwards. Of several due times the earliest wins. A
failed key is due again after its own exponential back-off with jitter. The queue holds only keys: a worker observes the
object's state when it gets the key.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

BACKOFF_MIN_S = 0.5
BACKOFF_MAX_S = 30.0


class WorkQueue(Generic[K]):
    """Belongs to one event loop; only its depth and age may be read in another thread."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, jitter: Callable[[], float] = random.random
    ) -> None:
        """`jitter` returns numbers in [0, 1)."""
        self._clock = clock
        self._jitter = jitter
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._order = itertools.count()
        self._working: set[K] = set()
        self._again: dict[K, float] = {}
        self._failures: dict[K, int] = {}
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: K, delay_s: float = 0.0) -> None:
        """Marks a key dirty: it is due in `delay_s` seconds at the latest."""
        self._add_at(key, self._clock() + max(0.0, delay_s))

    async def get(self) -> K:
        """Waits for the next due key. The caller must call `done` for it."""
        while True:
            wait_s = self._next_wait_s()
            if wait_s is not None and wait_s <= 0:
                _, _, key = heapq.heappop(self._heap)
                del self._due[key]
                self._working.add(key)
                self._wake_for_next()
                return key
            await self._wait()

    def done(self, key: K, *, failed: bool = False, wait_s: float = 0.0) -> None:
        """Marks the work on a key as finished; a failed one is due again after its back-off, added to `wait_s`.

        Keys that failed together are not due together: a back-off is between half and all of its step.
        """
        self._working.discard(key)
        again = self._again.pop(key, None)
        if failed:
            failures = self._failures.get(key, 0)
            self._failures[key] = failures + 1
            step_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2.0 ** min(failures, 10))
            self.add(key, wait_s + step_s * (0.5 + 0.5 * self._jitter()))
        else:
            self._failures.pop(key, None)
            if again is not None:
                self._add_at(key, again)

    def ready_depth(self) -> int:
        """Returns the number of keys that are due now."""
        now = self._clock()
        return sum(1 for due in tuple(self._due.values()) if due <= now)

    def oldest_age_s(self) -> float:
        """Returns how many seconds the most overdue key has waited; 0 if none is due."""
        now = self._clock()
        return max(0.0, now - min(tuple(self._due.values()), default=now))

    def idle(self) -> bool:
        """True if no key is due and no worker has one."""
        return not self._working and self.ready_depth() == 0

    def _add_at(self, key: K, due: float) -> None:
        waiting = self._again if key in self._working else self._due
        if key in waiting and waiting[key] <= due:
            return
        waiting[key] = due
        if waiting is self._due:
            heapq.heappush(self._heap, (due, next(self._order), key))
            if self._heap[0][0] == due:  # else a caller is woken for an earlier key first, and then for this one
                self._wake_for_next()

    async def _wait(self) -> None:
        """Waits until it is this caller's turn to look for a due key."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(woken)
        self._wake_for_next()
        try:
            await woken
        except asyncio.CancelledError:
            if woken.done() and not woken.cancelled():
                self._wake_for_next()  # another caller takes the turn
            raise

    def _wake_for_next(self) -> None:
        """Wakes one waiting caller, now or when the first key is due: of many workers only one is needed for a key."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiters and self._waiters[0].done():
            self._waiters.popleft()
        wait_s = self._next_wait_s() if self._waiters else None
        if wait_s is not None and wait_s <= 0:
            self._waiters.popleft().set_result(None)
        elif wait_s is not None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake_for_next)

    def _next_wait_s(self) -> float | None:
        """Returns the seconds until the first key is due; None if no key is queued."""
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) == due:
                return due - self._clock()
            heapq.heappop(self._heap)  # a stale entry: the key is due earlier or was handed out
        return None
