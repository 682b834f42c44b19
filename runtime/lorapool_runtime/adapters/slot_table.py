"""Which adapter sits in which slot, and which one would have to leave: a pure table, no clock and no engine.

`adapters` owns the one instance and calls it from the event loop. `can_admit` asks and changes nothing;
`allocate`, `settle`, `release` act and raise on an illegal move. It refuses to give away a slot in use or pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lorapool_api.common import AdapterKey


@dataclass(slots=True)
class Occupant:
    """One slot's tenant. `settled` is False from allocation until its weights are in the slot."""

    key: AdapterKey
    settled: bool = False
    leaving: bool = False
    """Its unload is under way: nobody may use the slot, and nobody may choose it as a victim again."""
    users: int = 0
    """Sequences that run on it."""
    pinned: bool = False
    last_used_s: float = 0.0

    @property
    def evictable(self) -> bool:
        return self.settled and not self.leaving and self.users == 0 and not self.pinned


@dataclass(frozen=True, slots=True)
class Admission:
    """What `can_admit` found: a free slot, or the victim that has to leave first."""

    slot: int
    victim: AdapterKey | None = None


@dataclass(slots=True)
class SlotTable:
    total: int
    _by_slot: dict[int, Occupant] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return len(self._by_slot)

    def occupant(self, slot: int) -> Occupant:
        return self._by_slot[slot]

    def can_admit(self, wanted: Callable[[AdapterKey], bool] = lambda _key: False) -> Admission | None:
        """A free slot, else the least recently used tenant that may leave, else None.

        `wanted` tells tenants that somebody waits for (they are about to be used) and that therefore stay.
        """
        for slot in range(self.total):
            if slot not in self._by_slot:
                return Admission(slot)
        victims = [
            (tenant.last_used_s, slot)
            for slot, tenant in self._by_slot.items()
            if tenant.evictable and not wanted(tenant.key)
        ]
        if not victims:
            return None
        _, slot = min(victims)
        return Admission(slot, self._by_slot[slot].key)

    def allocate(self, slot: int, key: AdapterKey, *, pinned: bool, now_s: float) -> Occupant:
        """Gives a free slot to `key`, whose weights are on their way."""
        if not 0 <= slot < self.total or slot in self._by_slot:
            raise ValueError(f"slot {slot} is not free")
        if any(tenant.key == key for tenant in self._by_slot.values()):
            raise ValueError(f"{key} already has a slot")
        tenant = Occupant(key, pinned=pinned, last_used_s=now_s)
        self._by_slot[slot] = tenant
        return tenant

    def settle(self, slot: int) -> None:
        """The weights are in the slot: from now on it may be used, and chosen as a victim."""
        self._by_slot[slot].settled = True

    def begin_leaving(self, slot: int) -> None:
        tenant = self._by_slot[slot]
        if tenant.users or tenant.leaving:
            raise ValueError(f"slot {slot} is in use or already leaving")
        tenant.leaving = True

    def release(self, slot: int) -> None:
        """The slot is empty again (unloaded, or its load failed)."""
        tenant = self._by_slot[slot]
        if tenant.users:
            raise ValueError(f"slot {slot} is in use")
        del self._by_slot[slot]

    def enter(self, slot: int) -> None:
        """One more sequence runs on it."""
        tenant = self._by_slot[slot]
        if not tenant.settled or tenant.leaving:
            raise ValueError(f"slot {slot} holds no usable adapter")
        tenant.users += 1

    def leave(self, slot: int, now_s: float) -> None:
        tenant = self._by_slot[slot]
        if tenant.users < 1:
            raise ValueError(f"slot {slot} is not in use")
        tenant.users -= 1
        tenant.last_used_s = now_s
