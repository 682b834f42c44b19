from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorapool_api.placement import Replica, placement_order

uids = st.lists(st.uuids().map(str), min_size=1, max_size=12, unique=True)


@given(st.uuids().map(str), uids, st.randoms())
def test_the_order_does_not_depend_on_the_order_of_the_replicas(adapter: str, pods: list[str], random: object) -> None:
    replicas = [Replica(pod) for pod in pods]
    shuffled = list(replicas)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert placement_order(adapter, replicas) == placement_order(adapter, shuffled)


@given(st.uuids().map(str), uids)
def test_losing_a_replica_keeps_the_order_of_the_others(adapter: str, pods: list[str]) -> None:
    order = placement_order(adapter, map(Replica, pods))
    for gone in pods:
        left = [pod for pod in pods if pod != gone]
        assert placement_order(adapter, map(Replica, left)) == [pod for pod in order if pod != gone]


def test_a_new_replica_moves_about_one_adapter_in_n() -> None:
    pods = [f"pod-{i}" for i in range(4)]
    adapters = [f"adapter-{i}" for i in range(2000)]
    before = {a: placement_order(a, map(Replica, pods))[0] for a in adapters}
    after = {a: placement_order(a, map(Replica, [*pods, "pod-4"]))[0] for a in adapters}
    moved = [a for a in adapters if before[a] != after[a]]
    assert all(after[a] == "pod-4" for a in moved)
    assert 0.15 < len(moved) / len(adapters) < 0.25


def test_a_replica_of_twice_the_weight_gets_twice_the_adapters() -> None:
    replicas = [Replica("small", 1.0), Replica("large", 2.0)]
    count = Counter(placement_order(f"adapter-{i}", replicas)[0] for i in range(6000))
    assert 1.8 < count["large"] / count["small"] < 2.2


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_positive_and_finite_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        placement_order("a", [Replica("p", weight)])
