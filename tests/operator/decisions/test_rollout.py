"""When the pods of a base are replaced: one base after the other, and not at all while it is paused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorapool_api.basemodel import BaseModelSpec, BaseModelStatus
from lorapool_operator.decisions.plan import BasePlan, PlanSettings
from lorapool_operator.decisions.plan_base import plan_base
from lorapool_operator.world.cluster_cache import BaseObject, Key, Meta, ObjectKind, PodObject, WorkloadObject
from lorapool_operator.world.observed import InspectionResult, ObservedBase, SourceFacts
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile

NOW = 1_700_000_000.0
KEY = Key(ObjectKind.BASE, "team", "tiny")
META = Meta("team", "tiny", "base-uid", 1, "1", NOW, False, None)
FULL = "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def pod(template: str, name: str = "old", *, ready: bool = True, problem: str = "") -> PodObject:
    meta = replace(META, name=name, uid=f"{name}-uid")
    return PodObject(meta, KEY, "base-uid", "10.0.0.1", 8000, ready, False, problem, template)


def deployment(template: str, *, paused: bool = False) -> WorkloadObject:
    return WorkloadObject(replace(META, name="tiny-runtime"), KEY, "base-uid", "", template, paused)


def observed(*pods: PodObject, **more: Any) -> ObservedBase:
    spec = BaseModelSpec.model_validate({"source": {"uri": "hf://org/base"}, "replicas": 2, **more.pop("spec", {})})
    known: dict[str, Any] = {
        "profile": RuntimeProfile(),
        "image": RuntimeImage("runtime:2", "IfNotPresent"),
        "token_sha256": ("ab" * 32,),
        "inspection": InspectionResult("base-uid/", 1, SourceFacts("sha256:" + "a" * 64, "rev"), NOW - 1, 0.5),
        "workload": deployment("old"),
    }
    return ObservedBase(base=BaseObject(META, spec, BaseModelStatus()), pods=pods, **{**known, **more})


def plan(of: ObservedBase, **settings: Any) -> BasePlan:
    return plan_base(of, NOW, PlanSettings(**settings))


def paused(made: BasePlan) -> bool:
    return bool(made.children[1]["spec"]["paused"])


def progressing(made: BasePlan) -> tuple[str, str, str]:
    assert made.status is not None
    return next((c.status, c.reason, c.message) for c in made.status.conditions if c.type == "Progressing")


def test_one_base_replaces_its_pods_and_the_next_one_waits() -> None:
    alone = plan(observed(pod("old")))
    assert (paused(alone), alone.begins_rollout) == (False, True)
    second = plan(observed(pod("old"), rolling_elsewhere=("team/other",)))
    assert (paused(second), second.begins_rollout, second.requeue_at) == (True, False, NOW + 5)
    assert progressing(second)[:2] == ("True", "RolloutWaiting")
    assert "team/other" in progressing(second)[2]


def test_a_waiting_rollout_does_not_stop_scaling() -> None:
    waiting = plan(observed(pod("old"), rolling_elsewhere=("team/other",), spec={"scaling": {"maxReplicas": 2}}))
    assert waiting.children[1]["spec"]["replicas"] == 2


def test_a_rollout_that_is_under_way_is_not_interrupted() -> None:
    template = plan(observed()).children[1]["spec"]["template"]["metadata"]["annotations"]["lorapool.dev/template-hash"]
    going = observed(pod("old"), workload=deployment(template), rolling_elsewhere=("team/other",))
    assert not paused(plan(going))
    assert paused(plan(replace(going, workload=deployment(template, paused=True))))


@pytest.mark.parametrize(("bound", "others", "waits"), [(0, 9, False), (2, 1, False), (2, 2, True)])
def test_the_administrator_decides_how_many_bases_replace_pods_together(bound: int, others: int, waits: bool) -> None:
    names = tuple(f"team/other-{number}" for number in range(others))
    assert paused(plan(observed(pod("old"), rolling_elsewhere=names), max_concurrent_rollouts=bound)) == waits


def test_a_base_without_old_pods_never_waits() -> None:
    assert not paused(plan(observed(rolling_elsewhere=("team/other",))))
    assert not paused(plan(observed(workload=None, spec={"paused": True})))


def test_a_paused_base_keeps_its_pods_and_says_so() -> None:
    made = plan(observed(pod("old"), spec={"paused": True}))
    assert (paused(made), made.begins_rollout) == (True, False)
    assert progressing(made)[:2] == ("False", "Paused")


def test_what_a_rollout_lacks_is_named_while_the_old_pod_serves() -> None:
    made = plan(observed(pod("old"), pod("new", "new", ready=False, problem=FULL)))
    assert "Insufficient nvidia.com/gpu" in progressing(made)[2]


def test_nothing_waits_while_the_template_is_not_known() -> None:
    made = plan(observed(pod("old"), profile=None, rolling_elsewhere=("team/other",)))
    assert made.children == ()
    assert progressing(made)[1] != "RolloutWaiting"
