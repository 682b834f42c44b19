"""Fewer replicas: which pods are stopped, what is moved before, and which idle base yields to a waking one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fakes_operator import digest

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_api.loraadapter import LoraAdapterSpec, LoraAdapterStatus, UsagePart
from lorapool_api.placement import Replica, placement_order
from lorapool_api.protocol import AdapterReport, AdapterState, BaseReport, RuntimeSnapshot, Tier
from lorapool_operator.decisions.plan import BasePlan, PlanSettings
from lorapool_operator.decisions.plan_base import plan_base
from lorapool_operator.decisions.scaling.preemption import choose
from lorapool_operator.decisions.scaling.stopping import HAND_OVER_S, emptiest, takes_over
from lorapool_operator.world.cluster_cache import (
    AdapterObject,
    BaseObject,
    Key,
    Meta,
    ObjectKind,
    PodObject,
    WorkloadObject,
)
from lorapool_operator.world.observed import (
    AdapterOnReplica,
    InspectionResult,
    ObservedAdapter,
    ObservedBase,
    RuntimeView,
    ScaleMemory,
    SourceFacts,
    Standing,
)
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile

NOW = 1_700_000_000.0
GPU = "nvidia.com/gpu"
KEY = Key(ObjectKind.BASE, "team", "tiny")
META = Meta("team", "tiny", "base-uid", 1, "1", NOW - 9999, False, None)
FILES = digest("files")


def pod(name: str, *, age_s: float = 5000.0, ready: bool = True, problem: str = "", cost: str = "") -> PodObject:
    meta = replace(META, name=name, uid=f"{name}-uid", created_unix_s=NOW - age_s)
    return PodObject(meta, KEY, "base-uid", "10.0.0.1", 8000, ready, False, problem, "", cost)


def runtime(name: str, in_flight: int = 0, adapters: int = 0, *, idle_s: float = 9999.0) -> RuntimeView:
    snapshot = RuntimeSnapshot(
        seq=1, boot_id=f"boot-{name}", started_unix_s=NOW - 9999, ready=True, slots_total=4, slots_used=adapters,
        max_rank=16, base=BaseReport(served_name="t", max_model_len=64, dtype="f"), in_flight=in_flight,
        last_request_unix_s=NOW - idle_s,
    )  # fmt: skip
    return RuntimeView(name, f"{name}-uid", True, False, snapshot, True)


def observed(pods: tuple[PodObject, ...], runtimes: tuple[RuntimeView, ...], **more: Any) -> ObservedBase:
    scaling = {"maxReplicas": 4, "targetInFlight": 10, "scaleDownDelay": "1m"}
    spec = BaseModelSpec.model_validate(
        {"source": {"uri": "hf://org/base"}, "replicas": len(pods), "scaling": scaling, **more.pop("spec", {})}
    )
    known: dict[str, Any] = {
        "profile": RuntimeProfile.model_validate({"resources": {"limits": {GPU: 1}}}),
        "image": RuntimeImage("runtime:1", "IfNotPresent"),
        "token_sha256": ("ab" * 32,),
        "inspection": InspectionResult("base-uid/", 1, SourceFacts(digest("base"), "rev"), NOW - 1, 0.5),
        "workload": WorkloadObject(replace(META, name="tiny-runtime"), KEY, "base-uid", ""),
        "memory": ScaleMemory(low_since_unix_s=NOW - 60),
    }
    return ObservedBase(BaseObject(META, spec, BaseModelStatus()), pods=pods, runtimes=runtimes, **{**known, **more})


def plan(of: ObservedBase, now: float = NOW) -> BasePlan:
    return plan_base(of, now, PlanSettings())


# --- scale-down


def test_the_emptiest_pod_is_stopped() -> None:
    pods = (pod("busy"), pod("warm"), pod("empty"), pod("young", age_s=1.0), pod("starting", ready=False))
    runtimes = (runtime("busy", 3), runtime("warm", 0, 2), runtime("empty"), runtime("young"))
    order = [item.meta.name for item in emptiest(observed(pods, runtimes), 5)]
    assert order == ["starting", "young", "empty", "warm", "busy"]


def test_kubernetes_is_told_which_pod_to_stop_before_the_number_is_lowered() -> None:
    made = plan(observed((pod("a", cost="-1"), pod("b")), (runtime("a", 5), runtime("b"))))
    assert (made.scale_to, made.deletion_costs) == (1, (("a", "0"), ("b", "-1")))
    low_only_now = observed((pod("a"), pod("b")), (runtime("a", 5), runtime("b", 3)), memory=ScaleMemory())
    assert plan(low_only_now).scale_to is None


def test_adapters_of_a_pod_move_before_it_is_stopped() -> None:
    of = observed((pod("a"), pod("b")), (runtime("a", 5, 2), runtime("b", 0, 1)))
    first = plan(of)
    assert (first.scale_to, first.deletion_costs, first.memory.leaving) == (None, (), ("b-uid",))
    assert first.requeue_at == NOW + HAND_OVER_S
    later = plan(replace(of, memory=first.memory), NOW + HAND_OVER_S)
    assert (later.scale_to, later.deletion_costs) == (1, (("b", "-1"),))


def test_a_scale_down_to_zero_moves_nothing() -> None:
    made = plan(observed((pod("a"), pod("b")), (runtime("a", 0, 2), runtime("b", 0, 1))))
    assert (made.scale_to, made.deletion_costs) == (0, ())


def adapter_on(*loaded: str, used_s: float = 1.0, full: bool = False, k: int = 1) -> frozenset[str]:
    """Returns who takes over an adapter, on pods a to c in placement order, of which the first is leaving."""
    order = placement_order("x", [Replica(f"{name}-uid") for name in "abc"])
    names = sorted("abc", key=lambda name: order.index(f"{name}-uid"))
    place = dict(zip("abc", names, strict=True))
    replicas = []
    for name in "abc":
        report = AdapterReport(
            uid="x", digest=FILES, display="team/x", state=AdapterState.LOADED, tier=Tier.DEVICE, since_unix_s=0.0,
            last_used_unix_s=NOW - used_s, usage=UsagePart(boot_id="boot"),
        )  # fmt: skip
        view = runtime(place[name], adapters=4 if full and name != "a" else 1)
        replicas.append(AdapterOnReplica(view, (report,) if name in loaded else ()))
    spec = LoraAdapterSpec.model_validate({"baseModelRef": {"name": "tiny"}, "source": {"uri": "hf://org/x"}})
    one = AdapterObject(replace(META, name="x", uid="x"), spec, LoraAdapterStatus())
    leaving = frozenset({f"{place['a']}-uid"})
    found = takes_over(ObservedAdapter(one, None, tuple(replicas), leaving=leaving), FILES, k, NOW)
    return frozenset(name for name in "abc" if f"{place[name]}-uid" in found)


def test_the_next_preferred_replica_takes_over_what_is_in_use_on_a_leaving_pod() -> None:
    assert adapter_on("a") == {"b"}
    assert adapter_on("a", k=2) == {"b", "c"}
    assert adapter_on("b") == frozenset()
    assert adapter_on("a", used_s=61) == frozenset()
    assert adapter_on("a", full=True) == frozenset()


# --- preemption

LACKS = f"Unschedulable: 0/3 nodes are available: 3 Insufficient {GPU}. preemption: not helpful."


def test_a_waking_base_that_cannot_be_scheduled_names_what_it_lacks() -> None:
    made = plan(observed((pod("a", ready=False, problem=LACKS),), ()))
    assert made.standing == Standing(lacks=frozenset({GPU}))
    assert made.requeue_at is not None
    assert made.requeue_at <= NOW + 5
    cpu = "Unschedulable: 0/3 nodes are available: 3 Insufficient cpu."
    assert plan(observed((pod("a", ready=False, problem=cpu),), ())).standing == Standing()


@pytest.mark.parametrize(
    ("in_flight", "spec", "idle"),
    [(0, {}, True), (1, {}, False), (0, {"scaling": {"minReplicas": 1}}, False)],
)
def test_only_an_idle_base_that_may_sleep_can_yield(in_flight: int, spec: dict[str, Any], idle: bool) -> None:
    standing = plan(observed((pod("a"),), (runtime("a", in_flight, idle_s=30.0),), spec=spec)).standing
    assert (standing.idle_since_unix_s is not None) == idle
    assert not idle or standing == Standing(idle_since_unix_s=NOW - 30, devices=frozenset({GPU}))


def test_the_base_that_is_idle_longest_yields() -> None:
    def base(name: str) -> Key:
        return Key(ObjectKind.BASE, "team", name)

    bases = {
        base("busy"): Standing(),
        base("short"): Standing(idle_since_unix_s=NOW - 20, devices=frozenset({GPU})),
        base("long"): Standing(idle_since_unix_s=NOW - 90, devices=frozenset({GPU})),
        base("cpu"): Standing(idle_since_unix_s=NOW - 900),
        base("just-used"): Standing(idle_since_unix_s=NOW - 4, devices=frozenset({"amd.com/gpu"})),
    }
    assert choose(frozenset({GPU}), bases, NOW) == base("long")
    assert choose(frozenset({"amd.com/gpu"}), bases, NOW) is None


def test_an_idle_base_yields_at_once_and_says_to_whom() -> None:
    of = observed((pod("a"),), (runtime("a", idle_s=30.0),), yields_to=Key(ObjectKind.BASE, "team", "waking"))
    made = plan(of)
    assert made.scale_to == 0
    [event] = [item for item in made.events if item.reason == "Preempted"]
    assert event.message == "From 1 to 0: preempted by the waking base team/waking."
    assert plan(replace(of, runtimes=(runtime("a", 1),))).scale_to is None
