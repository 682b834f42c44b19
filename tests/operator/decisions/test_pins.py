"""Which adapters are pinned where, and which of them keep a base running."""

from __future__ import annotations

from typing import Any

from lorapool_api.basemodel import BaseModelSpec
from lorapool_operator.decisions.pins import PinWanted, allowed_pins, kept_replicas, max_pinned


def base(**spec: Any) -> BaseModelSpec:
    return BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, **spec})


def wanted(count: int, *, namespace: str = "team", replicas: int = 1, prefix: str = "a") -> tuple[PinWanted, ...]:
    return tuple(PinWanted(float(number), f"{prefix}{number}", namespace, replicas) for number in range(count))


def pinned(made: dict[str, frozenset[str]]) -> list[str]:
    return [uid for uid, pods in made.items() if pods]


def test_half_of_the_slots_may_be_pinned_by_default_and_the_oldest_adapters_come_first() -> None:
    spec = base(lora={"slots": 4})
    assert max_pinned(spec) == 2
    assert pinned(dict(allowed_pins(wanted(5), ["pod"], spec))) == ["a0", "a1"]
    assert max_pinned(base(lora={"slots": 1})) == 1


def test_the_owner_sets_the_bound_of_each_replica() -> None:
    pods = [f"pod-{number}" for number in range(3)]
    made = allowed_pins(wanted(9, replicas=3), pods, base(lora={"maxPinned": 2}))
    for pod in pods:
        assert [uid for uid, on in made.items() if pod in on] == ["a0", "a1"]
    assert pinned(dict(allowed_pins(wanted(9), pods, base(lora={"maxPinned": 0})))) == []


def test_one_namespace_cannot_take_all_pins() -> None:
    spec = base(lora={"maxPinned": 3, "maxPinnedPerNamespace": 1})
    both = (*wanted(5, namespace="loud", prefix="l"), *wanted(5, namespace="quiet", prefix="q"))
    assert pinned(dict(allowed_pins(both, ["pod"], spec))) == ["l0", "q0"]


def test_a_guest_keeps_a_base_running_only_as_far_as_its_owner_allows() -> None:
    assert kept_replicas(3, base(), guest=False) == 3
    assert kept_replicas(3, base(), guest=True) == 0
    assert kept_replicas(3, base(access={"guests": {"keepAwake": True}}), guest=True) == 1
    assert kept_replicas(3, base(access={"guests": {"keepAwake": True, "maxReplicas": 2}}), guest=True) == 2
