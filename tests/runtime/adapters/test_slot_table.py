"""The slot table as a pure machine: whatever is done to it, an adapter in use keeps its slot."""

from __future__ import annotations

import pytest
from fakes_runtime import key_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorapool_runtime.adapters.slot_table import Admission, SlotTable

NAMES = [f"n{number}" for number in range(6)]


def load(table: SlotTable, slot: int, name: str, *, now_s: float = 0.0) -> None:
    table.allocate(slot, key_of(name), now_s)
    table.set_loaded(key_of(name))


def test_asking_changes_nothing() -> None:
    table = SlotTable(2)
    assert table.can_admit() == table.can_admit() == Admission(0)
    assert table.used == 0


def test_the_longest_unused_adapter_that_may_be_evicted_is_the_victim() -> None:
    table = SlotTable(3)
    for slot, (name, at) in enumerate([("n0", 3.0), ("n1", 1.0), ("n2", 2.0)]):
        load(table, slot, name, now_s=at)
    assert table.can_admit() == Admission(1, key_of("n1"))
    assert table.can_admit(lambda key: key != key_of("n1")) == Admission(2, key_of("n2"))
    assert table.can_admit(lambda _key: False) is None


def test_use_makes_an_adapter_the_last_victim() -> None:
    table = SlotTable(2)
    load(table, 0, "n0", now_s=1.0)
    load(table, 1, "n1", now_s=2.0)
    table.enter(key_of("n0"), 3.0)
    table.leave(key_of("n0"), 4.0)
    assert table.can_admit() == Admission(1, key_of("n1"))


def test_slots_in_use_unloading_or_still_loading_are_not_given_away() -> None:
    table = SlotTable(3)
    load(table, 0, "n0")
    table.enter(key_of("n0"), 0.0)
    load(table, 1, "n1")
    table.begin_unload(key_of("n1"))
    table.allocate(2, key_of("n2"), 0.0)
    assert table.can_admit() is None
    table.leave(key_of("n0"), 9.0)
    assert table.can_admit() == Admission(0, key_of("n0"))


def test_a_slot_is_an_adapters_own_from_load_to_the_end_of_its_unload() -> None:
    table, key = SlotTable(2), key_of("n0")
    table.allocate(1, key, 0.0)
    assert (table.slot_of(key), table.usable(key)) == (None, False)
    table.set_loaded(key)
    assert (table.slot_of(key), table.usable(key)) == (1, True)
    assert table.begin_unload(key) == 1
    assert (table.slot_of(key), table.usable(key)) == (1, False)
    table.release(key)
    assert (table.slot_of(key), table.usable(key), table.used) == (None, False, 0)


def test_illegal_moves_raise() -> None:
    table, key = SlotTable(2), key_of("n0")
    table.allocate(0, key, 0.0)
    with pytest.raises(ValueError, match="no usable adapter"):
        table.enter(key, 0.0)
    table.set_loaded(key)
    table.enter(key, 0.0)
    with pytest.raises(ValueError, match="in use"):
        table.begin_unload(key)
    with pytest.raises(ValueError, match="in use"):
        table.release(key)
    for slot in (0, 2, -1):
        with pytest.raises(ValueError, match="not free"):
            table.allocate(slot, key_of("n1"), 0.0)
    with pytest.raises(ValueError, match="already has a slot"):
        table.allocate(1, key, 0.0)
    table.leave(key, 1.0)
    with pytest.raises(ValueError, match="not in use"):
        table.leave(key, 1.0)
    table.begin_unload(key)
    with pytest.raises(ValueError, match="already unloading"):
        table.begin_unload(key)
    with pytest.raises(ValueError, match="no usable adapter"):
        table.enter(key, 0.0)


class Slots(RuleBasedStateMachine):
    """Requests come and go and adapters change slots, as the loader and the manager do it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(3)
        self.slots: dict[str, int] = {}
        self.users: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.now_s = 0.0

    def may_evict(self, key: object) -> bool:
        return key not in {key_of(name) for name in self.pinned}

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def load(self, name: str, pinned: bool) -> None:
        if name in self.slots:
            return
        admission = self.table.can_admit(self.may_evict)
        if admission is None:
            assert len(self.slots) == 3
            assert all(self.users[other] or other in self.pinned for other in self.slots)
            return
        if admission.victim is not None:
            victim = next(other for other in self.slots if key_of(other) == admission.victim)
            assert self.users[victim] == 0
            assert victim not in self.pinned
            assert self.table.begin_unload(admission.victim) == admission.slot
            self.table.release(admission.victim)
            del self.slots[victim]
        load(self.table, admission.slot, name, now_s=self.now_s)
        self.slots[name], self.users[name] = admission.slot, 0
        self.pinned = self.pinned | {name} if pinned else self.pinned - {name}

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.slots)))
        self.now_s += 1
        assert self.table.enter(key_of(name), self.now_s) == self.slots[name]
        self.users[name] += 1

    @precondition(lambda self: any(self.users[name] for name in self.slots))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name in self.slots if self.users[name])))
        self.now_s += 1
        self.table.leave(key_of(name), self.now_s)
        self.users[name] -= 1

    @invariant()
    def every_slot_holds_the_adapter_we_expect(self) -> None:
        assert self.table.used == len(self.slots) <= 3
        assert len(set(self.slots.values())) == len(self.slots)
        for name, slot in self.slots.items():
            assert self.table.slot_of(key_of(name)) == slot
            assert self.table.users(key_of(name)) == self.users[name]


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=30, deadline=None)
