"""Bounded queues of requests that no replica can answer yet.

Each base has a queue for requests that no replica accepts. Each adapter has one for requests that wait for its first
digest, so that a broken adapter cannot fill the queue of its base. A request beyond the bound is refused with 429.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorapool_api.openai import TooManyRequestsError

RETRY_AFTER_S = 2.0


class Hold:
    def __init__(self, on_change: Callable[[str, int], None]) -> None:
        """`on_change(base, +1 | -1)` updates the gauge."""
        self._waiting: Counter[str] = Counter()
        self._on_change = on_change

    def waiting(self, queue: str) -> int:
        return self._waiting[queue]

    @contextmanager
    def slot(self, queue: str, base: str, bound: int, *, known: bool) -> Iterator[None]:
        """Occupies one slot of a queue. `known`: the request has waited before and is admitted beyond the bound.

        Raises TooManyRequestsError with Retry-After when the queue is full.
        """
        if not known and self._waiting[queue] >= bound:
            raise TooManyRequestsError(
                f"Too many requests wait for {base} to start; at most {bound} are held.",
                code="too_many_held_requests",
                retry_after_s=RETRY_AFTER_S,
            )
        self._waiting[queue] += 1
        self._on_change(base, 1)
        try:
            yield
        finally:
            self._waiting[queue] -= 1
            if self._waiting[queue] <= 0:
                del self._waiting[queue]
            self._on_change(base, -1)
