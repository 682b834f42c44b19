"""The slot table as a pure machine: whatever is done to it, nobody loses a slot in use."""

from __future__ import annotations

import pytest
from fakes_runtime import key_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorapool_runtime.adapters.slot_table import Admission, SlotTable

NAMES = [f"n{number}" for number in range(6)]


def settled(table: SlotTable, slot: int, name: str, *, now_s: float, pinned: bool = False) -> None:
    table.allocate(slot, key_of(name), pinned=pinned, now_s=now_s)
    table.settle(slot)


def test_asking_changes_nothing() -> None:
    table = SlotTable(2)
    assert table.can_admit() == table.can_admit() == Admission(0)
    assert table.used == 0


def test_the_longest_unused_one_is_the_victim() -> None:
    table = SlotTable(3)
    for slot, (name, at) in enumerate([("n0", 3.0), ("n1", 1.0), ("n2", 2.0)]):
        settled(table, slot, name, now_s=at)
    assert table.can_admit() == Admission(1, key_of("n1"))
    assert table.can_admit(lambda key: key == key_of("n1")) == Admission(2, key_of("n2"))


def test_slots_in_use_pinned_leaving_or_still_loading_are_not_given_away() -> None:
    table = SlotTable(4)
    settled(table, 0, "n0", now_s=0)
    table.enter(0)
    settled(table, 1, "n1", now_s=0, pinned=True)
    settled(table, 2, "n2", now_s=0)
    table.begin_leaving(2)
    table.allocate(3, key_of("n3"), pinned=False, now_s=0)
    assert table.can_admit() is None
    table.leave(0, 9.0)
    assert table.can_admit() == Admission(0, key_of("n0"))


def test_illegal_moves_raise() -> None:
    table = SlotTable(1)
    settled(table, 0, "n0", now_s=0)
    table.enter(0)
    with pytest.raises(ValueError, match="in use"):
        table.begin_leaving(0)
    with pytest.raises(ValueError, match="in use"):
        table.release(0)
    with pytest.raises(ValueError, match="not free"):
        table.allocate(0, key_of("n1"), pinned=False, now_s=0)
    table.leave(0, 1.0)
    with pytest.raises(ValueError, match="not in use"):
        table.leave(0, 1.0)
    table.begin_leaving(0)
    with pytest.raises(ValueError, match="no usable adapter"):
        table.enter(0)


class Slots(RuleBasedStateMachine):
    """Requests come and go and adapters change places, as `adapters` does it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(3)
        self.where: dict[str, int] = {}
        self.users: dict[str, int] = {}
        self.now_s = 0.0

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def load(self, name: str, pinned: bool) -> None:
        if name in self.where:
            return
        admission = self.table.can_admit()
        if admission is None:
            assert len(self.where) == 3
            return
        if admission.victim is not None:
            victim = next(other for other in self.where if key_of(other) == admission.victim)
            assert self.users[victim] == 0
            self.table.begin_leaving(admission.slot)
            self.table.release(admission.slot)
            del self.where[victim]
        settled(self.table, admission.slot, name, now_s=self.now_s, pinned=pinned)
        self.where[name], self.users[name] = admission.slot, 0

    @precondition(lambda self: self.where)
    @rule(data=st.data())
    def enter(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.where)))
        self.now_s += 1
        self.table.enter(self.where[name])
        self.users[name] += 1

    @precondition(lambda self: any(self.users[name] for name in self.where))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(name for name in self.where if self.users[name])))
        self.now_s += 1
        self.table.leave(self.where[name], self.now_s)
        self.users[name] -= 1

    @invariant()
    def every_slot_holds_whom_we_think(self) -> None:
        assert self.table.used == len(self.where) <= 3
        assert len(set(self.where.values())) == len(self.where)
        for name, slot in self.where.items():
            assert self.table.occupant(slot).key == key_of(name)
            assert self.table.occupant(slot).users == self.users[name]


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=30, deadline=None)
