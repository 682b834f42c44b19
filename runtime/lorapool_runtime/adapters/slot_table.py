"""Which adapter occupies which slot, and which one can be evicted: a pure table, no clock and no engine.

The only owner of slot state. `can_admit` changes nothing; every other method makes one move and raises ValueError if
it is illegal. A slot in use is never given away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lorapool_api.common import AdapterKey


@dataclass(slots=True)
class _Occupant:
    """The adapter in one slot. `loaded` is False from allocation until its weights are in the slot."""

    slot: int
    last_used_s: float
    loaded: bool = False
    unloading: bool = False
    """Its unload has begun: no request may use the slot, and it is not chosen as a victim again."""
    users: int = 0
    """Requests that run on it."""

    @property
    def usable(self) -> bool:
        return self.loaded and not self.unloading


@dataclass(frozen=True, slots=True)
class Admission:
    """A free slot, or the slot of a victim that has to be unloaded first."""

    slot: int
    victim: AdapterKey | None = None


@dataclass(slots=True)
class SlotTable:
    total: int
    _occupants: dict[AdapterKey, _Occupant] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return len(self._occupants)

    @property
    def occupants(self) -> tuple[AdapterKey, ...]:
        """The adapters that have a slot, also while they are being loaded or unloaded."""
        return tuple(self._occupants)

    def slot_of(self, key: AdapterKey) -> int | None:
        """The slot that holds the adapter's weights, also while it is being unloaded."""
        occupant = self._occupants.get(key)
        return None if occupant is None or not occupant.loaded else occupant.slot

    def usable(self, key: AdapterKey) -> bool:
        """True when a request may start to run on the adapter's slot."""
        occupant = self._occupants.get(key)
        return occupant is not None and occupant.usable

    def users(self, key: AdapterKey) -> int:
        """How many requests run on the adapter's slot."""
        return self._occupants[key].users

    def can_admit(self, may_evict: Callable[[AdapterKey], bool] = lambda _key: True) -> Admission | None:
        """A free slot, else the slot of the least recently used adapter that may be evicted, else None."""
        taken = {occupant.slot for occupant in self._occupants.values()}
        for slot in range(self.total):
            if slot not in taken:
                return Admission(slot)
        victims = [
            (occupant.last_used_s, occupant.slot, key)
            for key, occupant in self._occupants.items()
            if occupant.usable and occupant.users == 0 and may_evict(key)
        ]
        if not victims:
            return None
        _, slot, victim = min(victims)
        return Admission(slot, victim)

    def allocate(self, slot: int, key: AdapterKey, now_s: float) -> None:
        """Gives a free slot to `key`, whose weights are about to be loaded."""
        if not 0 <= slot < self.total or any(occupant.slot == slot for occupant in self._occupants.values()):
            raise ValueError(f"slot {slot} is not free")
        if key in self._occupants:
            raise ValueError(f"{key} already has a slot")
        self._occupants[key] = _Occupant(slot, last_used_s=now_s)

    def set_loaded(self, key: AdapterKey) -> None:
        """Makes the slot usable, and its adapter a possible victim."""
        occupant = self._occupants[key]
        occupant.loaded = True

    def begin_unload(self, key: AdapterKey) -> int:
        """Makes the slot unusable and returns its number."""
        occupant = self._occupants[key]
        if occupant.users or occupant.unloading:
            raise ValueError(f"slot {occupant.slot} is in use or already unloading")
        occupant.unloading = True
        return occupant.slot

    def release(self, key: AdapterKey) -> None:
        """Frees the slot, after an unload or a failed load."""
        occupant = self._occupants[key]
        if occupant.users:
            raise ValueError(f"slot {occupant.slot} is in use")
        del self._occupants[key]

    def enter(self, key: AdapterKey, now_s: float) -> int:
        """Counts one more request that runs on the adapter's slot, and returns its number."""
        occupant = self._occupants[key]
        if not occupant.usable:
            raise ValueError(f"slot {occupant.slot} holds no usable adapter")
        occupant.users += 1
        occupant.last_used_s = now_s
        return occupant.slot

    def leave(self, key: AdapterKey, now_s: float) -> None:
        """Counts one request fewer."""
        occupant = self._occupants[key]
        if occupant.users < 1:
            raise ValueError(f"slot {occupant.slot} is not in use")
        occupant.users -= 1
        occupant.last_used_s = now_s
