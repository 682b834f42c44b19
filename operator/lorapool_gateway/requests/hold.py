"""Bounded queues of requests that no replica can answer yet. Pure.

Each base has a queue for requests that no replica accepts. Each adapter has one for requests that wait for its first
digest, so that a broken adapter cannot fill the queue of its base. When a queue is full, a request of a tenant that has
fewer in it than another displaces the youngest request of the tenant that has the most; the one that has the most is
refused with 429. Waiting requests continue in fair order: one of each tenant in turn, each tenant's oldest first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lorapool_api.openai import TooManyRequestsError

RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A request that waits in a queue."""

    queue: str
    tenant: str
    arrived_s: float
    end: Callable[[bool], None]
    """Ends its wait; True: since another request displaced it."""


class Hold:
    def __init__(self, on_change: Callable[[str, int], None]) -> None:
        """`on_change(base, +1 | -1)` updates the gauge."""
        self._queues: dict[str, dict[Held, None]] = {}
        self._counts: dict[str, Counter[str]] = {}
        """Requests by queue and tenant."""
        self._on_change = on_change

    def waiting(self, queue: str) -> int:
        return len(self._queues.get(queue, ()))

    def wake(self) -> None:
        """Ends every wait, in fair order."""
        for queue in list(self._queues.values()):
            for held in fair_order(queue):
                held.end(False)

    @contextmanager
    def slot(self, held: Held, base: str, bound: int, *, known: bool) -> Iterator[None]:
        """Occupies one slot of a queue. `known`: the request has waited before and is admitted beyond the bound.

        Raises TooManyRequestsError with Retry-After when the queue is full and no other tenant has more in it.
        """
        queue = self._queues.setdefault(held.queue, {})
        if not known and len(queue) >= bound:
            self._displace(held, base, bound)
        queue[held] = None
        self._counts.setdefault(held.queue, Counter())[held.tenant] += 1
        self._on_change(base, 1)
        try:
            yield
        finally:
            self._remove(held)
            self._on_change(base, -1)

    def _displace(self, held: Held, base: str, bound: int) -> None:
        victim = displaced_by(held, self._queues[held.queue], self._counts.get(held.queue, Counter()))
        if victim is None:
            self._drop_if_empty(held.queue)
            raise TooManyRequestsError(
                f"Too many requests wait for {base} to start; at most {bound} are held.",
                code="too_many_held_requests",
                retry_after_s=RETRY_AFTER_S,
            )
        self._remove(victim)
        victim.end(True)

    def _remove(self, held: Held) -> None:
        """Does nothing for a request that was displaced."""
        queue = self._queues.get(held.queue, {})
        if held in queue:
            del queue[held]
            self._counts[held.queue] -= Counter([held.tenant])
            self._drop_if_empty(held.queue)

    def _drop_if_empty(self, queue: str) -> None:
        if not self._queues.get(queue, True):
            del self._queues[queue]
            self._counts.pop(queue, None)


def displaced_error(base: str, bound: int) -> TooManyRequestsError:
    """The error of a request that another one has displaced."""
    return TooManyRequestsError(
        f"At most {bound} requests are held for {base}, and of all callers this one has the most there.",
        code="too_many_held_requests",
        retry_after_s=RETRY_AFTER_S,
    )


def displaced_by(held: Held, queue: Iterable[Held], counts: Mapping[str, int]) -> Held | None:
    """The youngest request of the tenant that has the most; None if it has no more than this request's would have.

    `counts`: requests in the queue by tenant.
    """
    most = max(counts, key=lambda tenant: counts[tenant], default=None)
    if most is None or counts[most] <= counts.get(held.tenant, 0) + 1:
        return None
    return max((other for other in queue if other.tenant == most), key=lambda other: other.arrived_s)


def fair_order(queue: Iterable[Held]) -> list[Held]:
    """One of each tenant in turn, each tenant's oldest first."""
    turns: Counter[str] = Counter()
    ranked: list[tuple[int, Held]] = []
    for held in sorted(queue, key=lambda held: held.arrived_s):
        ranked.append((turns[held.tenant], held))
        turns[held.tenant] += 1
    return [held for _, held in sorted(ranked, key=lambda pair: pair[0])]
