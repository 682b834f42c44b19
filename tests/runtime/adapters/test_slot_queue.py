"""Adapters wait for a slot in a fair queue: what it promises, on a clock that the test moves."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest
from fakes_runtime import key_of
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.common import AdapterKey
from lorapool_runtime.adapters.slot_queue import SlotPlan, SlotQueue
from lorapool_runtime.adapters.slot_table import SlotTable

A, B, C, D = (key_of(name) for name in "abcd")


def table_of(*loaded: AdapterKey, slots: int | None = None) -> SlotTable:
    """A table in which the adapters were loaded one second after another, from 0 on."""
    table = SlotTable(len(loaded) if slots is None else slots)
    for slot, key in enumerate(loaded):
        table.allocate(slot, key, float(slot))
        table.set_loaded(key, float(slot))
    return table


def plan(
    queue: SlotQueue, now_s: float, *, wanted: set[AdapterKey], pinned: frozenset[AdapterKey] = frozenset()
) -> SlotPlan:
    return queue.plan(now_s, wanted=lambda key: key in wanted or key in pinned, may_leave=lambda key: key not in pinned)


def test_a_free_slot_goes_to_the_first_that_is_ready() -> None:
    queue = SlotQueue(table_of(A, slots=2), 1.0, 30.0)
    queue.join(B, ready=False)
    queue.join(C, ready=True)
    queue.join(D, ready=True)
    assert plan(queue, 9.0, wanted={B, C, D}).grants == ((C, 1),)


def test_an_unused_adapter_makes_room_first_the_least_recently_used_one() -> None:
    table = table_of(A, B, C)
    table.enter(A, 3.0)
    table.enter(B, 4.0)
    table.leave(B, 6.0)
    table.enter(C, 5.0)
    table.leave(C, 5.0)
    queue = SlotQueue(table, 1.0, 30.0)
    queue.join(D, ready=True)
    assert plan(queue, 9.0, wanted={D}).leaving == (C,)


def test_of_adapters_in_use_the_one_that_was_loaded_first_makes_room_once_it_is_due() -> None:
    table = table_of(A, B)
    for key in (B, A):
        table.enter(key, 2.0)
    queue = SlotQueue(table, 5.0, 30.0)
    queue.join(C, ready=True)
    assert plan(queue, 4.9, wanted={A, B, C}) == SlotPlan(due_s=5.0)
    assert plan(queue, 5.0, wanted={A, B, C}).leaving == (A,)
    table.begin_drain(A)
    assert plan(queue, 5.1, wanted={A, B, C}) == SlotPlan()  # one is on its way, and one waits


def test_pinned_adapters_never_make_room_and_without_another_slot_the_queue_is_refused() -> None:
    table = table_of(A, B)
    table.enter(B, 2.0)
    queue = SlotQueue(table, 0.0, 30.0)
    queue.join(C, ready=True)
    assert plan(queue, 9.0, wanted={C}, pinned=frozenset({A})).leaving == (B,)
    assert plan(queue, 9.0, wanted={C}, pinned=frozenset({A, B})) == SlotPlan()
    assert queue.takes_too_long(lambda key: key not in {A, B})
    assert not queue.takes_too_long(lambda key: key != A)


def test_an_adapter_is_refused_when_the_minimum_residencies_before_it_exceed_the_wait() -> None:
    queue = SlotQueue(table_of(A, B), 10.0, 30.0)
    for number in range(7):
        assert not queue.takes_too_long(lambda _key: True)
        queue.join(key_of(f"w{number}"), ready=True)
    for number in range(7, 8):
        queue.join(key_of(f"w{number}"), ready=True)
    assert queue.takes_too_long(lambda _key: True)


def test_a_load_without_a_request_displaces_no_request() -> None:
    table = table_of(A, B)
    table.enter(A, 2.0)
    table.enter(B, 2.0)
    queue = SlotQueue(table, 0.0, 30.0)
    queue.join(C, ready=True)
    assert plan(queue, 9.0, wanted={A, B}) == SlotPlan()
    queue.join(D, ready=True)
    assert plan(queue, 9.0, wanted={A, B, D}).leaving == (A,)
    table.leave(B, 9.0)
    assert plan(queue, 9.0, wanted={A, D}).leaving == (B,)
    table.begin_unload(B)
    table.release(B)
    assert plan(queue, 9.0, wanted={A, D}).grants == ((D, 1),)  # though C came first


def test_an_adapter_stays_when_the_one_that_it_made_room_for_no_longer_waits() -> None:
    table = table_of(A)
    table.enter(A, 1.0)
    queue = SlotQueue(table, 0.0, 30.0)
    queue.join(B, ready=True)
    assert plan(queue, 2.0, wanted={A, B}).leaving == (A,)
    table.begin_drain(A)
    queue.join(A, ready=False)
    assert plan(queue, 3.0, wanted={A, B}) == SlotPlan()
    queue.leave(B)
    assert plan(queue, 4.0, wanted={A}).staying == (A,)


def test_an_adapter_that_has_not_served_the_requests_that_it_was_loaded_for_does_not_make_room() -> None:
    table = table_of(A)
    queue = SlotQueue(table, 0.0, 30.0)
    queue.join(B, ready=True)
    assert plan(queue, 9.0, wanted={A, B}).leaving == ()
    table.enter(A, 9.0)
    assert plan(queue, 9.0, wanted={A, B}).leaving == (A,)


@dataclass
class World:
    """Adapters with endless requests on few slots: time moves from event to event."""

    slots: int
    adapters: int
    residency_s: float
    longest_s: float
    rng: random.Random
    now_s: float = 0.0
    waits_since: dict[AdapterKey, float] = field(default_factory=dict)
    longest_wait_s: float = 0.0
    loads: list[tuple[float, int]] = field(default_factory=list)
    served_s: Counter[AdapterKey] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.table = SlotTable(self.slots)
        self.queue = SlotQueue(self.table, self.residency_s, math.inf)
        self.running: list[tuple[float, AdapterKey]] = []
        for number in range(self.adapters):
            self.wait(key_of(f"n{number}"))

    def wait(self, key: AdapterKey) -> None:
        self.waits_since.setdefault(key, self.now_s)
        self.queue.join(key, ready=self.table.slot_of(key) is None)

    def arrange(self) -> float | None:
        """Applies plans until nothing moves, as the loader does; loads and unloads take no time."""
        for _ in range(100):
            made = self.queue.plan(self.now_s, wanted=lambda _key: True, may_leave=lambda _key: True)
            for key, slot in made.grants:
                self.table.allocate(slot, key, self.now_s)
                self.table.set_loaded(key, self.now_s)
                self.queue.leave(key)
                self.loads.append((self.now_s, slot))
                self.longest_wait_s = max(self.longest_wait_s, self.now_s - self.waits_since.pop(key))
                self.ask(key)
            for key in made.leaving:
                self.table.begin_drain(key)
                self.wait(key)  # its next request is there already
            for key in made.staying:
                self.table.stop_drain(key)
                self.queue.leave(key)
                self.longest_wait_s = max(self.longest_wait_s, self.now_s - self.waits_since.pop(key))
            if not (made.grants or made.leaving or made.staying):
                return made.due_s
        raise AssertionError("the plans never come to rest")

    def ask(self, key: AdapterKey) -> None:
        self.table.enter(key, self.now_s)
        seconds = self.rng.uniform(0.1, self.longest_s)
        self.running.append((self.now_s + seconds, key))
        self.served_s[key] += round(seconds * 1000)

    def run(self, until_s: float) -> None:
        while self.now_s < until_s:
            due_s = self.arrange()
            ends_s, key = min(self.running)
            if due_s is not None and due_s < ends_s:
                self.now_s = due_s
                continue
            self.now_s = ends_s
            self.running.remove((ends_s, key))
            self.table.leave(key, self.now_s)
            if self.table.usable(key):
                self.ask(key)
            elif not self.table.users(key):
                self.table.begin_unload(key)
                self.table.release(key)
                self.queue.join(key, ready=True)


@settings(max_examples=25, deadline=None)
@given(
    slots=st.integers(1, 5),
    adapters=st.integers(1, 16),
    residency_s=st.sampled_from([1.0, 2.5]),
    longest_s=st.sampled_from([0.2, 1.0, 7.0]),
    seed=st.integers(0, 99),
)
def test_no_adapter_waits_longer_than_promised_and_no_slot_is_loaded_more_often(
    slots: int, adapters: int, residency_s: float, longest_s: float, seed: int
) -> None:
    world = World(slots, adapters, residency_s, longest_s, random.Random(seed))
    world.run(60.0)
    assert world.longest_wait_s <= math.ceil(adapters / slots) * (residency_s + longest_s)
    by_slot: dict[int, deque[float]] = {}
    for at_s, slot in world.loads:
        by_slot.setdefault(slot, deque()).append(at_s)
    for times in by_slot.values():
        assert all(later - earlier >= residency_s for earlier, later in zip(times, list(times)[1:], strict=False))


@pytest.mark.parametrize("seed", range(3))
def test_sixteen_hot_adapters_on_four_slots_each_get_more_than_half_of_their_share(seed: int) -> None:
    world = World(4, 16, residency_s=1.0, longest_s=2.0, rng=random.Random(seed))
    world.run(200.0)
    shares = [served / (sum(world.served_s.values()) / 16) for served in world.served_s.values()]
    assert len(shares) == 16
    assert min(shares) >= 0.5
