"""Which adapter occupies which slot: a pure table, no clock and no engine.

The only owner of slot state. Every method but the questions makes one move and raises ValueError if it is illegal. A
slot in use is never given away.

    allocate -> set_loaded -> usable --begin_unload--> unloading -> release
                                |  ^                       ^
                     begin_drain v  | stop_drain            | begin_unload, when no request runs any more
                               draining --------------------+
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lorapool_api.common import AdapterKey


@dataclass(frozen=True, slots=True)
class Occupant:
    """The adapter in one slot. `loaded` is False from allocation until its weights are in the slot."""

    key: AdapterKey
    slot: int
    last_used_s: float
    loaded: bool = False
    loaded_s: float = 0.0
    """When its weights were in the slot."""
    draining: bool = False
    """It admits no further request, and is unloaded when the running ones have ended."""
    unloading: bool = False
    """Its unload has begun: no request may use the slot."""
    users: int = 0
    """Requests that run on it."""
    served: bool = False
    """Whether a request has run on it since its load."""

    @property
    def usable(self) -> bool:
        return self.loaded and not self.making_room

    @property
    def making_room(self) -> bool:
        """Whether its slot becomes free without a further decision."""
        return self.draining or self.unloading


@dataclass(slots=True)
class SlotTable:
    total: int
    _occupants: dict[AdapterKey, Occupant] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return len(self._occupants)

    def occupants(self) -> list[Occupant]:
        """In the order of their allocation."""
        return list(self._occupants.values())

    def free_slots(self) -> list[int]:
        taken = {occupant.slot for occupant in self._occupants.values()}
        return [slot for slot in range(self.total) if slot not in taken]

    def slot_of(self, key: AdapterKey) -> int | None:
        """The slot that holds the adapter's weights, also while it is being unloaded."""
        occupant = self._occupants.get(key)
        return None if occupant is None or not occupant.loaded else occupant.slot

    def usable(self, key: AdapterKey) -> bool:
        """True when a request may start to run on the adapter's slot."""
        occupant = self._occupants.get(key)
        return occupant is not None and occupant.usable

    def draining(self, key: AdapterKey) -> bool:
        """True while the adapter makes room: it admits nothing, and requests still run or its unload follows."""
        occupant = self._occupants.get(key)
        return occupant is not None and occupant.draining

    def users(self, key: AdapterKey) -> int:
        """How many requests run on the adapter's slot."""
        return self._occupants[key].users

    def allocate(self, slot: int, key: AdapterKey, now_s: float) -> None:
        """Gives a free slot to `key`, whose weights are about to be loaded."""
        if slot not in self.free_slots():
            raise ValueError(f"slot {slot} is not free")
        if key in self._occupants:
            raise ValueError(f"{key} already has a slot")
        self._occupants[key] = Occupant(key, slot, last_used_s=now_s)

    def set_loaded(self, key: AdapterKey, now_s: float) -> None:
        """Makes the slot usable."""
        self._change(key, loaded=True, loaded_s=now_s)

    def begin_drain(self, key: AdapterKey) -> None:
        """Lets no further request run on the slot."""
        self._must_be_usable(key)
        self._change(key, draining=True)

    def stop_drain(self, key: AdapterKey) -> None:
        """Makes a draining slot usable again."""
        if not self.draining(key) or self._occupants[key].unloading:
            raise ValueError(f"slot {self._occupants[key].slot} does not drain")
        self._change(key, draining=False)

    def begin_unload(self, key: AdapterKey) -> int:
        """Makes the slot unusable and returns its number."""
        occupant = self._occupants[key]
        if occupant.users or occupant.unloading:
            raise ValueError(f"slot {occupant.slot} is in use or already unloading")
        self._change(key, unloading=True)
        return occupant.slot

    def release(self, key: AdapterKey) -> None:
        """Frees the slot, after an unload or a failed load."""
        occupant = self._occupants[key]
        if occupant.users:
            raise ValueError(f"slot {occupant.slot} is in use")
        del self._occupants[key]

    def enter(self, key: AdapterKey, now_s: float) -> int:
        """Counts one more request that runs on the adapter's slot, and returns its number."""
        occupant = self._must_be_usable(key)
        self._change(key, users=occupant.users + 1, last_used_s=now_s, served=True)
        return occupant.slot

    def leave(self, key: AdapterKey, now_s: float) -> None:
        """Counts one request fewer."""
        occupant = self._occupants[key]
        if occupant.users < 1:
            raise ValueError(f"slot {occupant.slot} is not in use")
        self._change(key, users=occupant.users - 1, last_used_s=now_s)

    def _must_be_usable(self, key: AdapterKey) -> Occupant:
        occupant = self._occupants[key]
        if not occupant.usable:
            raise ValueError(f"slot {occupant.slot} holds no usable adapter")
        return occupant

    def _change(self, key: AdapterKey, **changes: object) -> None:
        self._occupants[key] = replace(self._occupants[key], **changes)  # type: ignore[arg-type]
