"""The order in which replicas are tried, as a function of what they report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorapool_api.placement import Replica as Placeable
from lorapool_api.placement import placement_order
from lorapool_gateway.routing.objects import Endpoint, ObjectRef, RuntimeState, adapter_route, base_route
from lorapool_gateway.routing.pick import candidates, is_loaded
from lorapool_gateway.routing.routes import RuntimeReplica, Target

DIGEST = "sha256:" + "a" * 64
REF = ObjectRef("demo", "tiny")
BASE = base_route(
    {"metadata": {"namespace": "demo", "name": "tiny", "uid": "b"}, "spec": {"source": {"uri": "hf://org/tiny"}}}
)
ADAPTER = adapter_route(
    {
        "metadata": {"namespace": "demo", "name": "route", "uid": "a"},
        "spec": {"baseModelRef": {"name": "tiny"}, "source": {"uri": "hf://org/route"}},
    }
)
ON_BASE, ON_ADAPTER = Target(BASE), Target(BASE, ADAPTER, DIGEST)
ORDER = placement_order("a", [Placeable(f"pod-{letter}") for letter in "abcd"])


def replica(pod: str, *, in_flight: int = 0, loaded: bool = False, failed: bool = False) -> RuntimeReplica:
    endpoint = Endpoint(REF, BASE.uid, pod, pod, f"http://{pod}", ready=True, terminating=False)
    digests = frozenset({("a", DIGEST)}) if loaded else frozenset()
    state = RuntimeState("boot", ready=True, draining=False, in_flight=in_flight, loaded=digests)
    return RuntimeReplica(endpoint, state, failed, proven=True)


def order(target: Target, *replicas: RuntimeReplica, **in_flight: int) -> list[str]:
    own = {pod.replace("_", "-"): count for pod, count in in_flight.items()}
    return [item.endpoint.pod_uid for item in candidates(target, replicas, own)]


@pytest.mark.parametrize("turn", range(4))
def test_replicas_without_the_adapter_come_in_placement_order_however_busy_they_are(turn: int) -> None:
    replicas = [replica(pod, in_flight=9 - number) for number, pod in enumerate(ORDER)]
    assert order(ON_ADAPTER, *replicas[turn:], *replicas[:turn]) == ORDER


def test_replicas_with_the_adapter_come_first_and_the_least_busy_of_them_ahead() -> None:
    first, second, third, fourth = ORDER
    replicas = [
        replica(first),
        replica(second, in_flight=5, loaded=True),
        replica(third, in_flight=2, loaded=True),
        replica(fourth, in_flight=3, loaded=True),
    ]
    assert order(ON_ADAPTER, *replicas) == [third, fourth, second, first]


def spread_over(k: int) -> Target:
    return replace(ON_ADAPTER, adapter=replace(ADAPTER, preferred_replicas=k))


def test_the_preferred_replicas_of_a_hot_adapter_share_its_requests() -> None:
    first, second, third, fourth = ORDER
    loaded = [replica(first, in_flight=20, loaded=True), replica(second, in_flight=3, loaded=True)]
    others = [replica(third, loaded=True), replica(fourth)]
    assert order(spread_over(2), *others, *loaded) == [second, first, third, fourth]
    assert order(spread_over(3), *others, *loaded) == [third, second, first, fourth]


def test_a_cold_adapter_stays_at_its_home_when_it_is_loaded_elsewhere_too() -> None:
    first, second, third, fourth = ORDER
    replicas = [replica(first, in_flight=200, loaded=True), replica(second, loaded=True), replica(third)]
    assert order(ON_ADAPTER, *replicas, replica(fourth)) == [first, second, third, fourth]


def test_no_request_waits_for_a_load_on_a_preferred_replica_while_another_has_the_adapter() -> None:
    first, second, third, _ = ORDER
    assert order(spread_over(2), replica(first), replica(second), replica(third, loaded=True)) == [third, first, second]


def test_the_number_of_preferred_replicas_is_read_from_the_status() -> None:
    raw = {
        "metadata": {"namespace": "demo", "name": "route", "uid": "a"},
        "spec": {"baseModelRef": {"name": "tiny"}, "source": {"uri": "hf://org/route"}},
    }
    assert adapter_route(raw).preferred_replicas == 1
    hot = {"placement": {"k": 3, "replicas": ["x", "y", "z"], "why": "load"}}
    assert adapter_route({**raw, "status": hot}).preferred_replicas == 3


def test_equally_busy_replicas_with_the_adapter_come_in_placement_order() -> None:
    assert order(ON_ADAPTER, *(replica(pod, in_flight=1, loaded=True) for pod in reversed(ORDER))) == ORDER


def test_another_digest_of_the_adapter_is_not_the_adapter() -> None:
    first, second, *_ = ORDER
    other = frozenset({("a", "sha256:" + "b" * 64), ("b", DIGEST)})
    stale = replica(second)
    assert stale.state is not None
    stale = replace(stale, state=replace(stale.state, loaded=other))
    assert order(ON_ADAPTER, stale, replica(first)) == [first, second]
    assert not is_loaded(ON_ADAPTER, stale)


def test_a_base_is_answered_by_the_least_busy_replica_and_ties_by_uid() -> None:
    replicas = [replica("pod-c"), replica("pod-a", in_flight=2), replica("pod-d", in_flight=1), replica("pod-b")]
    assert order(ON_BASE, *replicas) == ["pod-b", "pod-c", "pod-d", "pod-a"]
    assert all(is_loaded(ON_BASE, item) for item in replicas)


def test_the_larger_of_the_own_and_the_reported_count_is_the_load() -> None:
    replicas = [replica("pod-a", in_flight=1), replica("pod-b", in_flight=3), replica("pod-c")]
    assert order(ON_BASE, *replicas, pod_a=2, pod_b=1) == ["pod-c", "pod-a", "pod-b"]
    assert order(ON_BASE, *replicas, pod_a=4, pod_c=5) == ["pod-b", "pod-a", "pod-c"]
    assert order(ON_BASE, replica("pod-a", in_flight=1), replica("pod-b")) == ["pod-b", "pod-a"]


def test_a_replica_without_a_report_counts_as_idle_and_without_the_adapter() -> None:
    unknown = replace(replica("pod-a"), state=None)
    assert order(ON_BASE, replica("pod-b"), unknown) == ["pod-a", "pod-b"]
    assert not is_loaded(ON_ADAPTER, unknown)
    assert order(ON_BASE, replica("pod-b", in_flight=1), unknown, pod_a=2) == ["pod-b", "pod-a"]


@pytest.mark.parametrize("target", [ON_BASE, ON_ADAPTER], ids=["base", "adapter"])
def test_a_replica_whose_poll_failed_comes_last_even_with_the_adapter(target: Target) -> None:
    first, second, *_ = ORDER
    replicas = [replica(first, loaded=True, failed=True), replica(second, in_flight=9)]
    assert order(target, *replicas) == [second, first]
    assert order(target, *reversed(replicas)) == [second, first]


def test_a_replica_that_may_not_be_used_is_left_out_even_alone() -> None:
    good = replica("pod-a")
    gone = replace(good, endpoint=replace(good.endpoint, terminating=True))
    assert order(ON_ADAPTER, gone) == []
    assert order(ON_ADAPTER, good, gone) == ["pod-a"]
    assert order(ON_ADAPTER) == []
