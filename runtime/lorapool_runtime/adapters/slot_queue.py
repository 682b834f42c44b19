"""Which adapters wait for a slot, and which ones give theirs up: pure, no clock and no engine.

First come, first served. An adapter keeps its slot for at least `min_residency_s`, so that a slot is not loaded more
often than once in that time. Then it may have to make room: an unused one leaves at once, least recently used first;
of those in use the one that has had its slot longest stops admitting requests and leaves when its running ones have
ended. None waits longer than (waiting adapters / slots) x (minimum residency + longest running answer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lorapool_api.common import AdapterKey
from lorapool_runtime.adapters.slot_table import Occupant, SlotTable


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """The moves to make now."""

    grants: tuple[tuple[AdapterKey, int], ...] = ()
    """Waiting adapters, each with its free slot."""
    leaving: tuple[AdapterKey, ...] = ()
    """Adapters that have to make room, from now on without new requests."""
    staying: tuple[AdapterKey, ...] = ()
    """Adapters that no longer have to make room, since fewer wait than when they were chosen."""
    due_s: float | None = None
    """When the next adapter may be asked to leave; None: no moment is known."""


@dataclass(slots=True)
class SlotQueue:
    table: SlotTable
    min_residency_s: float
    max_wait_s: float
    _ready: dict[AdapterKey, bool] = field(default_factory=dict)
    """Waiting adapters in their order, and whether their weights can be put into a slot."""

    @property
    def is_empty(self) -> bool:
        return not self._ready

    def join(self, key: AdapterKey, *, ready: bool) -> None:
        """Queues an adapter, or changes whether it is ready. It keeps its place."""
        self._ready[key] = ready

    def leave(self, key: AdapterKey) -> None:
        self._ready.pop(key, None)

    def takes_too_long(self, may_leave: Callable[[AdapterKey], bool]) -> bool:
        """Whether an adapter that joins now cannot get a slot in `max_wait_s`, however short the answers are."""
        movable = self.table.total - sum(not may_leave(occupant.key) for occupant in self.table.occupants())
        return movable <= 0 or len(self._ready) // movable * self.min_residency_s > self.max_wait_s

    def has_unused_slot(self, *, wanted: Callable[[AdapterKey], bool], may_leave: Callable[[AdapterKey], bool]) -> bool:
        """Whether a slot is free, or taken by an adapter without requests that may leave."""
        return bool(self.table.free_slots()) or any(_is_unused(o, wanted) for o in self._movable(wanted, may_leave))

    def plan(
        self, now_s: float, *, wanted: Callable[[AdapterKey], bool], may_leave: Callable[[AdapterKey], bool]
    ) -> SlotPlan:
        """`wanted`: a request waits for the adapter, or it is pinned. Others get only slots that are not in use.

        `may_leave`: False for pinned adapters and for those that are being deleted. To be called again after a plan
        with `staying`.
        """
        occupants, free = self.table.occupants(), self.table.free_slots()
        queue = sorted((key for key in self._ready if self._ready[key] or wanted(key)), key=lambda key: not wanted(key))
        placed = {occupant.key for occupant in occupants}
        grants = tuple(zip((key for key in queue if self._ready[key] and key not in placed), free, strict=False))
        supply = len(free) + sum(occupant.making_room for occupant in occupants)
        outside = [key for key in queue if key not in placed]  # the others still have to leave their slot
        wanted_outside = sum(map(wanted, outside))
        draining = [occupant.key for occupant in reversed(occupants) if occupant.draining and not occupant.unloading]
        if supply > wanted_outside and draining:
            by_need = sorted(draining, key=lambda key: key not in queue)
            return SlotPlan(grants, staying=tuple(by_need[: supply - wanted_outside]))
        leaving = self._leaving(len(outside) - supply, len(outside) - wanted_outside, wanted, may_leave)
        due = [occupant.loaded_s + self.min_residency_s for occupant in leaving]
        return SlotPlan(
            grants,
            leaving=tuple(o.key for o, due_s in zip(leaving, due, strict=True) if due_s <= now_s),
            due_s=min((due_s for due_s in due if due_s > now_s), default=None),
        )

    def _leaving(
        self,
        missing: int,
        speculative: int,
        wanted: Callable[[AdapterKey], bool],
        may_leave: Callable[[AdapterKey], bool],
    ) -> list[Occupant]:
        """The adapters that make room for `missing` others, of which the last `speculative` displace no request."""
        movable = self._movable(wanted, may_leave)
        unused = sorted((o for o in movable if _is_unused(o, wanted)), key=lambda o: (o.last_used_s, o.slot))
        used = sorted((o for o in movable if not _is_unused(o, wanted)), key=lambda o: (o.loaded_s, o.slot))
        return unused[: max(0, missing)] + used[: max(0, missing - speculative - len(unused))]

    def _movable(self, wanted: Callable[[AdapterKey], bool], may_leave: Callable[[AdapterKey], bool]) -> list[Occupant]:
        """The adapters that may leave; not one for which requests wait and that has served none since its load."""
        return [o for o in self.table.occupants() if o.usable and may_leave(o.key) and (o.served or not wanted(o.key))]


def _is_unused(occupant: Occupant, wanted: Callable[[AdapterKey], bool]) -> bool:
    return not occupant.users and not wanted(occupant.key)
