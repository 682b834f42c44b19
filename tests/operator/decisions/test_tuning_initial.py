"""Jobs that continue an adapter: what is known to be wrong is refused, and nothing starts before it is checked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tuning_plans import adapter, condition, observed, only, plan

from lorapool_operator.world.cluster_cache import AdapterObject
from lorapool_operator.world.tuning import ObservedJob

DIGEST = "sha256:" + "a" * 64


def continues(first: AdapterObject, **lora: Any) -> ObservedJob:
    return replace(observed(initFrom={"name": "first"}, lora=lora), initial=first)


def checked(rank: int = 8, **source: Any) -> AdapterObject:
    return adapter("first", status={"digest": DIGEST, "rank": rank}, **source)


def test_a_trainer_starts_once_the_adapter_is_checked() -> None:
    waits = plan(continues(adapter("first")))
    assert (waits.start, condition(only(waits), "Admitted")) == ((), ("False", "Pending"))
    assert plan(continues(checked())).start
    assert plan(continues(checked(), rank=8)).start


@pytest.mark.parametrize(
    ("first", "lora", "said"),
    [
        (checked(), {"rank": 4}, "spec.lora.rank is 4, but the adapter of spec.initFrom has 8"),
        (checked(rank=200), {}, "Rank 200 is above"),
        (checked(uri="hf://org/first"), {}, "not from the store"),
    ],
)
def test_an_adapter_that_cannot_be_continued_is_refused_before_a_pod(
    first: AdapterObject, lora: dict[str, Any], said: str
) -> None:
    found = plan(continues(first, **lora))
    assert found.start == ()
    assert condition(only(found), "Completed") == ("True", "Incompatible")
    status = only(found).status
    assert status is not None
    assert status.failure is not None
    assert said in status.failure.message
