"""Which requests are accepted when all places are taken: no tenant and no adapter excludes another."""

from __future__ import annotations

import asyncio

import pytest
from fakes_runtime import until

from lorapool_api.openai import TooManyRequestsError
from lorapool_runtime.serving.admission import Admission, FairBound, Place


def bound_with(places: int, *taken: Place) -> FairBound:
    bound = FairBound(places)
    for place in taken:
        bound.enter(place)
    return bound


def test_the_places_of_one_adapter_do_not_exclude_another_of_the_same_tenant() -> None:
    hot = [Place("", "a", 1) for _ in range(8)]
    bound = bound_with(8, *hot)
    assert not bound.admits(Place("", "a", 1))
    for flow, share in (("b", 4), ("c", 2), ("d", 2)):
        for _ in range(share):
            place = Place("", flow, 1)
            assert bound.admits(place)
            bound.enter(place)
        assert not bound.admits(Place("", flow, 1))
    assert not bound.admits(Place("", "e", 1))  # never more than twice as many
    for place in hot:
        bound.leave(place)
    assert bound.admits(Place("", "e", 1))


def test_a_tenant_with_many_adapters_has_one_share() -> None:
    bound = bound_with(8, *(Place("many", flow, 1) for flow in "abcdefgh"))
    assert [bound.admits(Place("one", "a", sequences)) for sequences in (4, 5)] == [True, False]
    assert not bound.admits(Place("many", "a", 1))


def test_the_youngest_waiting_requests_of_the_tenant_that_has_the_most_make_room() -> None:
    waiting = [Place("a", "x", 1), Place("b", "x", 1), Place("a", "x", 2), Place("a", "x", 1)]
    bound = bound_with(8, Place("a", "x", 3), *waiting)
    assert bound.displaced_by(Place("c", "x", 1), waiting) == [waiting[3]]
    assert bound.displaced_by(Place("c", "x", 2), waiting) == [waiting[3], waiting[2]]
    assert bound.displaced_by(Place("b", "x", 1), waiting) == [waiting[3]]
    assert bound.displaced_by(Place("a", "x", 1), waiting) == []
    assert bound.displaced_by(Place("c", "x", 1), []) == []


def test_tenants_that_have_as_many_do_not_displace_each_other() -> None:
    waiting = [Place(tenant, "x", 1) for tenant in "abab"]
    bound = bound_with(4, *waiting)
    assert bound.displaced_by(Place("a", "x", 1), waiting) == []
    assert bound.displaced_by(Place("c", "x", 1), waiting) == [waiting[3]]


async def test_a_displaced_request_gets_429_and_its_place_is_free_at_once() -> None:
    changes = 0

    def changed() -> None:
        nonlocal changes
        changes += 1

    admission = Admission(2, changed)

    async def wait(place: Place) -> None:
        async with admission.waiting(place):
            await asyncio.Event().wait()

    places = [Place("a", "x", 1), Place("a", "x", 1)]
    tasks = []
    for place in places:
        admission.enter(place)
        tasks.append(asyncio.create_task(wait(place)))
    await until(lambda: len(admission._waiting) == 2)
    admission.enter(Place("b", "x", 1))
    assert admission.requests == 2
    with pytest.raises(TooManyRequestsError, match="this one has the most"):
        await tasks[1]
    admission.leave(places[1])
    assert (admission.requests, changes) == (2, 4)
    with pytest.raises(TooManyRequestsError, match="its maximum is 2"):
        admission.enter(Place("a", "x", 1))
    tasks[0].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_it_is_quiet_when_the_last_request_has_left() -> None:
    admission, place = Admission(2, lambda: None), Place("a", "x", 1)
    admission.enter(place)
    assert not admission.quiet.is_set()
    admission.leave(place)
    assert admission.quiet.is_set()
