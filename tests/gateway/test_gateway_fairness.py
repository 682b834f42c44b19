"""Tenants that send more than there is room for: the one with the most is refused first, and none excludes another."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fakes import FakeRuntime
from fakes_runtime import FakeEngine, save_byte_tokenizer, serving
from gateway_world import KEY, OTHER_KEY, World, api_key, until, world
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapool_api.openai import TooManyRequestsError
from lorapool_api.protocol import token_sha256
from lorapool_gateway.requests.hold import Held, Hold, displaced_by, fair_order
from lorapool_gateway.routing.auth import KeyTable

OTHER = {"Authorization": f"Bearer {OTHER_KEY}"}
BOUND = 8


@pytest.fixture
async def here():
    """A base at zero replicas, which two tenants may use."""
    async with world() as made:
        made.keys.publish(KeyTable.of([api_key(KEY), api_key(OTHER_KEY)]))
        made.base(replicas=0, coldStart={"maxWait": "20s", "maxQueued": BOUND})
        yield made


def held(here: World) -> float:
    return here.sample("held_requests", base="demo/tiny")


async def test_a_key_that_fills_the_queue_of_a_sleeping_base_does_not_exclude_another(here: World) -> None:
    flood = [asyncio.create_task(here.post(here.ask("tiny"))) for _ in range(BOUND)]
    await until(lambda: held(here) == BOUND)
    other = asyncio.create_task(here.post(here.ask("tiny"), headers=OTHER))
    await until(lambda: any(task.done() for task in flood))
    refused = next(task for task in flood if task.done()).result()
    error = (await refused.json())["error"]
    assert (refused.status, error["code"], refused.headers["Retry-After"]) == (429, "too_many_held_requests", "2")
    assert "this one has the most" in error["message"]
    again = await here.post(here.ask("tiny"))
    assert again.status == 429  # the one that has the most gets no place
    async with FakeRuntime().running() as runtime:
        here.replica(runtime)
        answers = await asyncio.gather(other, *flood)
    assert Counter(answer.status for answer in answers) == {200: BOUND, 429: 1}
    assert held(here) == 0


async def test_when_the_base_wakes_the_tenants_continue_in_turn(here: World) -> None:
    flood = [asyncio.create_task(here.post(here.ask("tiny", "flood"))) for _ in range(BOUND - 1)]
    await until(lambda: held(here) == BOUND - 1)
    other = asyncio.create_task(here.post(here.ask("tiny", "other"), headers=OTHER))
    await until(lambda: held(here) == BOUND)
    async with FakeRuntime().running() as runtime:
        here.replica(runtime)
        await asyncio.gather(other, *flood)
    order = [seen.body["messages"][-1]["content"] for seen in runtime.seen]
    assert order.index("other") <= 3


async def test_a_key_that_fills_a_running_replica_does_not_exclude_another(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tokenizer: Path = save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    engine = FakeEngine(reply=lambda *_: "x" * 400, step_s=0.005, max_batch=2)
    bounds = {"max_batch": 2, "max_waiting": 6, "token_sha256": token_sha256("t" * 64)}
    async with serving(tokenizer, engine=engine, **bounds) as served, world() as here:
        here.keys.publish(KeyTable.of([api_key(KEY), api_key(OTHER_KEY)]))
        here.base(coldStart={"maxWait": "20s", "maxQueued": BOUND})
        here.replica(served.url)
        flood = [asyncio.create_task(here.post(here.ask("tiny", max_tokens=400))) for _ in range(16)]
        await until(lambda: held(here) == BOUND)
        other = await here.post(here.ask("tiny", max_tokens=2), headers=OTHER)
        assert other.status == 200
        assert sum(task.done() and task.result().status == 200 for task in flood) <= 3  # those that ran already
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


async def test_a_key_that_fills_the_gateway_leaves_room_for_another() -> None:
    async with world(max_requests=18) as here:
        here.keys.publish(KeyTable.of([api_key(KEY), api_key(OTHER_KEY)]))
        here.base(replicas=0)
        flood = [asyncio.create_task(here.post(here.ask("tiny"))) for _ in range(20)]
        await until(lambda: sum(task.done() for task in flood) == 4)
        refused = [task.result() for task in flood if task.done()]
        assert {(await response.json())["error"]["code"] for response in refused} == {"key_share_exceeded"}
        asking = asyncio.create_task(here.post(here.ask("tiny"), headers=OTHER))
        await until(lambda: held(here) == 17)
        for task in (asking, *flood):
            task.cancel()
        await asyncio.gather(asking, *flood, return_exceptions=True)


# --- the decisions ------------------------------------------------------------------------


def queue(*tenants: str) -> list[Held]:
    return [Held("q", tenant, float(number), lambda displaced: None) for number, tenant in enumerate(tenants)]


def names(order: Iterable[Held]) -> list[tuple[str, float]]:
    return [(held.tenant, held.arrived_s) for held in order]


def test_each_tenant_continues_in_turn_with_its_oldest_request() -> None:
    assert names(fair_order(queue(*"aaabbc"))) == [("a", 0), ("b", 3), ("c", 5), ("a", 1), ("b", 4), ("a", 2)]


def test_the_youngest_request_of_the_tenant_that_has_the_most_is_displaced() -> None:
    waiting = queue(*"aabaab")
    counts = {"a": 4, "b": 2}
    victim = displaced_by(queue("c")[0], waiting, counts)
    assert victim is waiting[4]
    assert displaced_by(queue("a")[0], waiting, counts) is None
    assert displaced_by(queue("b")[0], waiting, counts) is victim
    assert displaced_by(queue("c")[0], queue(*"ab"), {"a": 1, "b": 1}) is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=80))
def test_a_tenant_within_its_share_is_neither_refused_nor_displaced(arrivals: list[tuple[int, bool]]) -> None:
    hold = Hold(lambda base, change: None)
    inside: dict[float, tuple[str, AbstractContextManager[None]]] = {}
    displaced: list[float] = []
    for number, (tenant, leaves) in enumerate(arrivals):
        if leaves and inside:
            inside.pop(next(iter(inside)))[1].__exit__(None, None, None)
        arrived_s = float(number)
        made = Held("q", str(tenant), arrived_s, lambda _, at=arrived_s: displaced.append(at))  # type: ignore[misc]
        displaced.clear()
        counts = Counter(name for name, _ in inside.values())
        share = BOUND // len(counts.keys() | {made.tenant})
        slot = hold.slot(made, "base", BOUND, known=False)
        try:
            slot.__enter__()
        except TooManyRequestsError:
            assert counts[made.tenant] + 1 > share
            continue
        for victim in displaced:
            name, left = inside.pop(victim)
            assert counts[name] > share
            left.__exit__(None, None, None)
        inside[arrived_s] = made.tenant, slot
        assert hold.waiting("q") == len(inside) <= BOUND
