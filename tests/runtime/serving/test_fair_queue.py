"""Whose request starts next: the queue counts tokens, so that no adapter starves another."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_runtime.serving.fair_queue import FairQueue, Ticket


def started(queue: FairQueue) -> list[Ticket]:
    found = []
    while (ticket := queue.start_next()) is not None:
        found.append(ticket)
    return found


def queue_with(rows: int, *flows: str, tokens: int = 10) -> FairQueue:
    queue = FairQueue(rows)
    for flow in flows:
        queue.join(Ticket(flow, 1, tokens))
    return queue


def test_requests_of_one_flow_start_in_their_order_up_to_a_few_more_than_the_engine_computes() -> None:
    queue = FairQueue(8)
    tickets = [Ticket("a", 1, number) for number in range(20)]
    for ticket in tickets:
        queue.join(ticket)
    assert started(queue) == tickets[:9]
    queue.end(tickets[0])
    assert started(queue) == tickets[9:10]
    assert queue.waiting("a") == 10


def test_the_flow_that_was_served_fewer_tokens_is_next() -> None:
    queue = queue_with(1, *"aaabb")
    first = queue.start_next()
    assert first is not None
    queue.charge(first, 25)
    queue.end(first)
    order = []
    while (ticket := queue.start_next()) is not None:
        order.append(ticket.flow)
        queue.charge(ticket, 2)
        queue.end(ticket)
    assert order == ["b", "b", "a", "a"]


def test_a_flow_that_comes_back_has_saved_up_nothing() -> None:
    queue = queue_with(1, *"aaaaaaaa", tokens=100)
    for _ in range(4):
        ticket = queue.start_next()
        assert ticket is not None
        queue.end(ticket)
    for _ in range(4):
        queue.join(Ticket("b", 1, 100))
    order = []
    while (ticket := queue.start_next()) is not None:
        order.append(ticket.flow)
        queue.end(ticket)
    assert sorted(order[:4]) == ["a", "a", "b", "b"]


def test_a_flow_below_its_share_starts_though_another_has_filled_the_engine() -> None:
    queue = queue_with(8, *"a" * 40)
    assert len(started(queue)) == 9
    for _ in range(6):
        queue.join(Ticket("b", 1, 10))
    assert [ticket.flow for ticket in started(queue)] == ["b"] * 4


def test_a_recalled_flow_leaves_the_queue_in_its_order_and_what_runs_stays_counted() -> None:
    queue = queue_with(1, *"aaaa")
    running = started(queue)
    recalled = queue.recall("a")
    assert (len(running), len(recalled), queue.waiting("a")) == (2, 2, 0)
    assert queue.recall("none") == []
    queue.join(recalled[0])
    assert queue.start_next() is None
    queue.end(running[0])
    assert queue.start_next() is recalled[0]


@settings(max_examples=20, deadline=None)
@given(flows=st.integers(2, 5), rows=st.integers(1, 6), seed=st.integers(0, 99))
def test_flows_that_always_wait_are_served_the_same_number_of_tokens(flows: int, rows: int, seed: int) -> None:
    rng, queue = random.Random(seed), FairQueue(rows)
    served, running, longest = [0] * flows, [], 60
    for flow in range(flows):
        for _ in range(40 if flow == 0 else rows + 2):  # the first one floods
            queue.join(Ticket(str(flow), 1, rng.randrange(1, 20)))
    for _ in range(1500):
        while (ticket := queue.start_next()) is not None:
            served[int(ticket.flow)] += ticket.tokens
            running.append([ticket, rng.randrange(1, longest)])
        for item in running[:rows]:
            item[1] -= 1
            queue.charge(item[0], 1)
            served[int(item[0].flow)] += 1
        for item in [item for item in running if item[1] <= 0]:
            running.remove(item)
            queue.join(Ticket(item[0].flow, 1, rng.randrange(1, 20)))
            queue.end(item[0])
    assert max(served) - min(served) <= 4 * (rows + 2) * (longest + 20)
    assert min(served) > sum(served) / flows / 2


def test_a_tenant_with_many_adapters_gets_no_more_than_one_with_a_single_one() -> None:
    queue, served = FairQueue(4), Counter[str]()
    for flow in "abcdefg":
        for _ in range(20):
            queue.join(Ticket(flow, 1, 10, "many"))
    for _ in range(20):
        queue.join(Ticket("a", 1, 10, "one"))
    for ticket in started(queue):
        queue.end(ticket)
    for _ in range(30):
        ticket = queue.start_next()
        assert ticket is not None
        served[ticket.tenant] += 1
        queue.end(ticket)
    assert abs(served["many"] - served["one"]) <= 7


def test_tenants_that_use_the_same_adapter_share_it() -> None:
    queue = FairQueue(1)
    for _ in range(50):
        queue.join(Ticket("base", 1, 10, "flood"))
    for _ in range(3):
        queue.join(Ticket("base", 1, 10, "other"))
    order = []
    for _ in range(8):
        ticket = queue.start_next()
        assert ticket is not None
        order.append(ticket.tenant)
        queue.end(ticket)
    assert order[:6].count("other") == 3


def test_an_adapter_that_leaves_its_slot_recalls_the_requests_of_all_tenants() -> None:
    queue = FairQueue(1)
    tickets = [Ticket("a", 1, 1, tenant) for tenant in "xyx"] + [Ticket("b", 1, 1, "x")]
    for ticket in tickets:
        queue.join(ticket)
    assert queue.waiting("a") == 3
    assert queue.recall("a") == [tickets[0], tickets[2], tickets[1]]
    assert started(queue) == [tickets[3]]
