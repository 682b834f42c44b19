"""The slot table as a pure machine: whatever is done to it, an adapter in use keeps its slot."""

from __future__ import annotations

import pytest
from fakes_runtime import key_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorapool_runtime.adapters.slot_table import SlotTable

NAMES = [f"n{number}" for number in range(6)]


def load(table: SlotTable, slot: int, name: str, *, now_s: float = 0.0) -> None:
    table.allocate(slot, key_of(name), now_s)
    table.set_loaded(key_of(name), now_s)


def test_a_slot_is_an_adapters_own_from_load_to_the_end_of_its_unload() -> None:
    table, key = SlotTable(2), key_of("n0")
    table.allocate(1, key, 0.0)
    assert (table.slot_of(key), table.usable(key)) == (None, False)
    table.set_loaded(key, 0.0)
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
    table.set_loaded(key, 0.0)
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
    for move in (lambda: table.enter(key, 0.0), lambda: table.begin_drain(key)):
        with pytest.raises(ValueError, match="no usable adapter"):
            move()
    with pytest.raises(ValueError, match="does not drain"):
        table.stop_drain(key)


def test_a_draining_slot_admits_nothing_and_may_become_usable_again() -> None:
    table, key = SlotTable(1), key_of("n0")
    load(table, 0, "n0")
    table.enter(key, 1.0)
    table.begin_drain(key)
    with pytest.raises(ValueError, match="no usable adapter"):
        table.enter(key, 2.0)
    assert (table.slot_of(key), table.usable(key), table.draining(key)) == (0, False, True)
    table.stop_drain(key)
    assert table.enter(key, 3.0) == 0
    table.begin_drain(key)
    for _ in range(2):
        table.leave(key, 4.0)
    table.begin_unload(key)
    with pytest.raises(ValueError, match="does not drain"):
        table.stop_drain(key)


class Slots(RuleBasedStateMachine):
    """Requests come and go and adapters change slots, as the loader and the manager do it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(3)
        self.slots: dict[str, int] = {}
        self.users: dict[str, int] = {}
        self.now_s = 0.0

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        if name in self.slots:
            return
        free = self.table.free_slots()
        unused = [other for other in self.slots if not self.users[other]]
        assert len(free) == 3 - len(self.slots)
        if free:
            slot = free[0]
        elif unused:
            slot = self.table.begin_unload(key_of(unused[0]))
            self.table.release(key_of(unused[0]))
            del self.slots[unused[0]]
        else:
            return
        load(self.table, slot, name, now_s=self.now_s)
        self.slots[name], self.users[name] = slot, 0

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
