"""Which requests a runtime accepts: bounded in all, and no tenant or adapter excludes another.

When all places are taken, a request of a tenant that has fewer than another one displaces the youngest waiting requests
of the one that has the most. Where none wait, or all requests are of one tenant, an adapter still gets its share beyond
the places. All together have at most twice the places.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lorapool_api.openai import CODE_QUEUE_FULL, TooManyRequestsError

RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """An accepted request: so many sequences of one tenant, on one adapter or the base."""

    tenant: str
    flow: str
    sequences: int


@dataclass(slots=True)
class FairBound:
    """Counts the places that are taken. Pure."""

    places: int
    taken: int = 0
    tenants: Counter[str] = field(default_factory=Counter)
    _flows: Counter[tuple[str, str]] = field(default_factory=Counter)

    def fits(self, sequences: int) -> bool:
        return self.taken + sequences <= self.places

    def admits(self, place: Place) -> bool:
        """Whether it fits, or is within its adapter's share of its tenant's share."""
        if self.fits(place.sequences):
            return True
        tenants = len(self.tenants.keys() | {place.tenant})
        flows = {flow for tenant, flow in self._flows if tenant == place.tenant} | {place.flow}
        own = self._flows[place.tenant, place.flow] + place.sequences
        return own <= self.places // tenants // len(flows) and self.taken + place.sequences <= 2 * self.places

    def enter(self, place: Place) -> None:
        self._add(place, place.sequences)

    def leave(self, place: Place) -> None:
        self._add(place, -place.sequences)

    def _add(self, place: Place, sequences: int) -> None:
        self.taken += sequences
        self.tenants[place.tenant] += sequences
        self._flows[place.tenant, place.flow] += sequences
        if not self.tenants[place.tenant]:
            del self.tenants[place.tenant]
        if not self._flows[place.tenant, place.flow]:
            del self._flows[place.tenant, place.flow]

    def displaced_by(self, place: Place, waiting: Iterable[Place]) -> list[Place]:
        """The waiting places, oldest first in `waiting`, that make room for this one; none if they are not enough.

        Each is of the tenant that has the most, and would still have more than this one's if it were left in.
        """
        own = self.tenants[place.tenant] + place.sequences
        if max(self.tenants.values(), default=0) <= own:
            return []
        left = list(waiting)
        taken, missing, found = Counter(self.tenants), self.taken + place.sequences - self.places, list[Place]()
        while missing > 0:
            heavier = [other for other in left if taken[other.tenant] > own]
            if not heavier:
                return []
            most = max(taken[other.tenant] for other in heavier)
            victim = next(other for other in reversed(heavier) if taken[other.tenant] == most)
            left.remove(victim)
            found.append(victim)
            taken[victim.tenant] -= victim.sequences
            missing -= victim.sequences
        return found


class Admission:
    def __init__(self, places: int, on_change: Callable[[], None]) -> None:
        """`places`: sequences queued or running. `on_change` is called when a request enters or leaves."""
        self._bound = FairBound(places)
        self._waiting: dict[Place, asyncio.Timeout] = {}
        self._on_change = on_change
        self._inside: set[Place] = set()
        self.quiet = asyncio.Event()
        """Set while no request is inside."""
        self.quiet.set()

    @property
    def requests(self) -> int:
        """Requests queued or running, including those that wait for a load."""
        return len(self._inside)

    def enter(self, place: Place) -> None:
        """Raises TooManyRequestsError."""
        if not self._bound.fits(place.sequences):
            for victim in self._bound.displaced_by(place, self._waiting):
                self._displace(victim)
        if not self._bound.admits(place):
            raise TooManyRequestsError(
                f"This replica has {self._bound.taken} sequences queued or running; its maximum is "
                f"{self._bound.places}.",
                code=CODE_QUEUE_FULL,
                retry_after_s=RETRY_AFTER_S,
            )
        self._bound.enter(place)
        self._inside.add(place)
        self.quiet.clear()
        self._on_change()

    def leave(self, place: Place) -> None:
        """Does nothing for a place that was displaced."""
        if place not in self._inside:
            return
        self._inside.remove(place)
        self._bound.leave(place)
        if not self._inside:
            self.quiet.set()
        self._on_change()

    @asynccontextmanager
    async def waiting(self, place: Place) -> AsyncIterator[None]:
        """Inside, the request waits and may be displaced: its wait then ends with TooManyRequestsError."""
        try:
            async with asyncio.timeout(None) as bound:
                self._waiting[place] = bound
                try:
                    yield
                finally:
                    self._waiting.pop(place, None)
        except TimeoutError:
            if not bound.expired():
                raise
            raise TooManyRequestsError(
                "This replica is full, and of all its callers this one has the most requests on it.",
                code=CODE_QUEUE_FULL,
                retry_after_s=RETRY_AFTER_S,
            ) from None

    def _displace(self, place: Place) -> None:
        self._waiting.pop(place).reschedule(asyncio.get_running_loop().time())
        self.leave(place)
