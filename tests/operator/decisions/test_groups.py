"""A base whose replicas are groups of pods on several nodes: its objects, rollouts, scaling, and failures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from base_world import IMAGE, NOW, base, condition, deployment, groups, message, plan, pod, runtime, world
from base_world import meta as meta_of
from profile_kit import RWX, two_nodes

from lorapool_api.basemodel import BaseModelStatus, StartStatus
from lorapool_api.common import (
    ANNOTATION_TEMPLATE_HASH,
    LABEL_BASE,
    LABEL_COMPONENT,
    LABEL_WORKER_INDEX,
    BaseCondition,
    Reason,
)
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.clock import iso
from lorapool_operator.decisions.manifests import children, network_policy, template_hash
from lorapool_operator.decisions.plan import BasePlan
from lorapool_operator.decisions.pods import Manifest, content_hash
from lorapool_operator.decisions.scaling.stopping import emptiest
from lorapool_operator.effects.apply import NO_GROUPS, refusal
from lorapool_operator.effects.cluster import ClusterError, ObjectNotFoundError
from lorapool_operator.world.cluster_cache import HELD_BACK, PodObject, WorkloadObject
from lorapool_operator.world.observed import FailingGroup, ObservedBase
from lorapool_operator.world.problems import last_crash, reason_of
from lorapool_operator.world.profiles import RuntimeProfile

PROFILE = RuntimeProfile.model_validate(two_nodes(cache={"pvc": RWX}))
CRASH = "CrashLoopBackOff: the container ended with exit code 1 (Error). NCCL error"


def made(profile: RuntimeProfile = PROFILE, *, tls: bool = False, paused: bool = False, **spec: Any) -> list[Manifest]:
    rules = SourceRules(owner="team")
    return children(base(**spec), profile, IMAGE, replicas=2, token_sha256=("ab",), rules=rules, tls=tls, paused=paused)


def of_kind(kind: str, of: list[Manifest]) -> Manifest:
    return next(item for item in of if item["kind"] == kind)


def group_template(**more: Any) -> Manifest:
    found: Manifest = of_kind("LeaderWorkerSet", made(**more))["spec"]["leaderWorkerTemplate"]
    return found


def env_of(template: Manifest) -> dict[str, Any]:
    items = template["spec"]["containers"][0]["env"]
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in items}


def observed(*pods: PodObject, workers: tuple[PodObject, ...] = (), **more: Any) -> ObservedBase:
    of = more.pop("of", base(replicas=1))
    return world(of, **{"profile": PROFILE, "pods": pods, "workers": workers, "workload": groups(), **more})


def leader(group: int = 0, **more: Any) -> PodObject:
    return pod(f"tiny-runtime-{group}", group=group, **more)


def worker(**more: Any) -> PodObject:
    return pod("tiny-runtime-0-1", group=0, **more)


# --- the objects


def test_several_nodes_are_a_group_of_pods_that_starts_again_as_a_whole() -> None:
    spec = of_kind("LeaderWorkerSet", made())["spec"]
    assert "Deployment" not in [item["kind"] for item in made()]
    assert (spec["replicas"], spec["leaderWorkerTemplate"]["size"]) == (2, 2)
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"
    # the controller makes a Service for each group, and none with the name of ours
    assert spec["networkConfig"] == {"subdomainPolicy": "UniquePerReplica"}
    bounds = spec["rolloutStrategy"]["rollingUpdateConfiguration"]
    assert bounds == {"maxSurge": 0, "maxUnavailable": 1}


def test_only_the_leader_answers_and_is_selected_and_measured() -> None:
    template = group_template(tls=True)
    head, other = template["leaderTemplate"], template["workerTemplate"]
    container = other["spec"]["containers"][0]
    assert container["command"] == head["spec"]["containers"][0]["command"]
    assert not {"ports", "startupProbe", "readinessProbe", "livenessProbe"} & container.keys()
    assert [port["name"] for port in head["spec"]["containers"][0]["ports"]] == ["https", "metrics"]
    assert "runtime-tls" not in [item["name"] for item in other["spec"]["volumes"]]
    assert not [name for name in other["metadata"]["annotations"] if name.startswith("prometheus.io/")]
    assert (head["metadata"]["labels"][LABEL_COMPONENT], other["metadata"]["labels"][LABEL_COMPONENT]) == (
        "runtime",
        "worker",
    )
    assert other["metadata"]["labels"][LABEL_BASE] == "tiny"  # its NetworkPolicy is the base's
    assert of_kind("Service", made())["spec"]["selector"][LABEL_WORKER_INDEX] == "0"
    status = plan(observed(leader())).status
    assert status is not None
    assert status.selector == f"{LABEL_WORKER_INDEX}=0,lorapool.dev/base=tiny,lorapool.dev/base-uid=base-uid"
    assert LABEL_WORKER_INDEX not in of_kind("Service", made(RuntimeProfile()))["spec"]["selector"]
    assert LABEL_WORKER_INDEX not in of_kind("PodDisruptionBudget", made())["spec"]["selector"]["matchLabels"]


def test_the_pods_of_one_group_share_a_folder_for_adapters_and_no_other_group_does() -> None:
    template = group_template(scaling={"maxReplicas": 4})
    for part in ("leaderTemplate", "workerTemplate"):
        env = env_of(template[part])
        names = list(env)
        assert env["LORAPOOL_RUNTIME_CACHE_DIR"] == "/adapters/base-uid/$(LORAPOOL_GROUP)"
        assert names.index("LORAPOOL_GROUP") < names.index("LORAPOOL_RUNTIME_CACHE_DIR")  # else it is not expanded
        path = "metadata.labels['leaderworkerset.sigs.k8s.io/group-index']"
        assert env["LORAPOOL_GROUP"] == {"fieldRef": {"fieldPath": path}}
        assert int(env["LORAPOOL_RUNTIME_CACHE_BYTES"]) == int(200 * 2**30 // 4 * 0.9)
        volumes = {item["name"]: item for item in template[part]["spec"]["volumes"]}
        assert volumes["adapters"]["persistentVolumeClaim"] == {"claimName": "tiny-adapters"}
    claims = [item["metadata"]["name"] for item in made() if item["kind"] == "PersistentVolumeClaim"]
    assert claims == ["tiny-runtime", "tiny-adapters"]


def test_a_group_knows_its_network_and_keeps_the_files_of_its_base_on_each_node() -> None:
    env = env_of(group_template()["workerTemplate"])
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("eth0", "eth0")
    assert env["VLLM_HOST_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert env["LORAPOOL_RUNTIME_BASE_CACHE_DIR"] == "/models"
    shared = RuntimeProfile.model_validate(two_nodes())
    assert env_of(group_template(profile=shared)["workerTemplate"])["LORAPOOL_RUNTIME_BASE_CACHE_DIR"] == "/cache/bases"
    own = RuntimeProfile.model_validate(two_nodes(env=[{"name": "NCCL_SOCKET_IFNAME", "value": "ib0"}]))
    assert env_of(group_template(profile=own)["leaderTemplate"])["NCCL_SOCKET_IFNAME"] == "ib0"


def test_pods_of_a_base_with_groups_may_reach_each_other_on_any_port() -> None:
    rules = {"ingress": [{"from": [{"podSelector": {}}]}], "egress": []}
    profile = PROFILE.model_copy(update={"network_policy": rules})
    [policy] = network_policy(base(), profile)
    peer = {"podSelector": policy["spec"]["podSelector"]}
    assert policy["spec"]["ingress"] == [*rules["ingress"], {"from": [peer]}]
    assert policy["spec"]["egress"] == [{"to": [peer]}]
    [single] = network_policy(base(), RuntimeProfile(network_policy=rules))
    assert (single["spec"]["ingress"], single["spec"]["egress"]) == (rules["ingress"], [])


def test_the_hash_of_a_group_covers_its_workers_and_their_number() -> None:
    hashes = {template_hash(made()), template_hash(made(tls=True))}
    wider = RuntimeProfile.model_validate(two_nodes(cache={"pvc": RWX}, nodes=4, pipelineParallel=4))
    hashes |= {template_hash(made(wider))}
    assert len(hashes - {""}) == 3
    assert template_hash(made(tls=True, paused=True)) in hashes
    leader_alone = group_template()["leaderTemplate"]
    hashed = leader_alone["metadata"]["annotations"].pop(ANNOTATION_TEMPLATE_HASH)
    assert hashed != content_hash(leader_alone)


def test_a_strategy_that_stops_all_pods_first_stops_all_groups_first() -> None:
    profile = PROFILE.model_copy(update={"rollout": PROFILE.rollout.model_copy(update={"strategy": "Recreate"})})
    [found] = [item for item in made(profile) if item["kind"] == "LeaderWorkerSet"]
    bounds = found["spec"]["rolloutStrategy"]["rollingUpdateConfiguration"]
    assert bounds == {"maxUnavailable": "100%", "maxSurge": 0}


# --- changes of the kind, rollouts, scaling


def test_the_deployment_goes_once_the_groups_exist_and_not_before() -> None:
    old = observed(pod(), runtimes=(runtime(),), workload=None, other_workload=deployment())
    first = plan(old)
    assert [item["kind"] for item in first.children].count("LeaderWorkerSet") == 1
    assert first.remove == ()
    then = plan(replace(old, workload=groups(), applied_hash=first.children_hash))
    assert then.remove == (deployment(),)
    back = observed(leader(), profile=RuntimeProfile(), workload=deployment(), other_workload=groups())
    assert plan(back).remove == (groups(),)


def test_a_cluster_without_leader_worker_sets_keeps_what_serves_and_says_how_to_install_them() -> None:
    child = {"kind": "LeaderWorkerSet", "metadata": {"name": "tiny-runtime"}}
    problem = refusal(child, ObjectNotFoundError("PATCH: 404", 404))
    assert problem is not None
    assert (problem.reason, problem.message) == (Reason.LEADER_WORKER_SET_MISSING, NO_GROUPS)
    assert refusal({**child, "kind": "Deployment"}, ObjectNotFoundError("PATCH: 404", 404)) is None
    assert refusal(child, ClusterError("503", 503)) is None
    serving = observed(pod(), runtimes=(runtime(),), workload=None, other_workload=deployment(), child_problem=problem)
    assert plan(serving).remove == ()
    assert condition(plan(serving), BaseCondition.READY) == ("True", Reason.DEGRADED)
    assert "https://lws.sigs.k8s.io/docs/installation" in message(plan(serving), BaseCondition.READY)


def test_what_a_deleted_base_of_the_same_name_left_is_removed_whatever_its_kind() -> None:
    left = observed(workload=groups("former-uid"), other_workload=deployment("former-uid"))
    assert plan(left).remove == (groups("former-uid"), deployment("former-uid"))
    assert plan(left).children == ()


@pytest.mark.parametrize("kind", [groups, None])
def test_a_paused_base_keeps_its_pods(kind: Any) -> None:
    of = base(replicas=1, paused=True)
    paused = observed(leader(template_hash="old"), of=of, runtimes=(runtime("tiny-runtime-0"),))
    if kind is None:  # the profile asks for the other kind
        paused = replace(paused, workload=None, other_workload=deployment())
        assert (plan(paused).children, plan(paused).remove) == ((), ())
    else:
        bounds = of_kind("LeaderWorkerSet", list(plan(paused).children))["spec"]["rolloutStrategy"]
        assert bounds["rollingUpdateConfiguration"]["partition"] == HELD_BACK
    assert condition(plan(paused), BaseCondition.PROGRESSING) == ("False", Reason.PAUSED)


def raw_groups(**spec: Any) -> dict[str, Any]:
    [item] = [child for child in made() if child["kind"] == "LeaderWorkerSet"]
    item["metadata"] |= {"uid": "groups-uid"}
    item["spec"] |= spec
    return item


def test_a_leader_worker_set_is_parsed_like_a_deployment() -> None:
    found = WorkloadObject.parse_groups(raw_groups())
    assert (found.owner_uid, found.template_hash, found.kind) == ("base-uid", template_hash(made()), "LeaderWorkerSet")
    assert not found.paused
    assert not found.rolling
    updating = {"conditions": [{"type": "UpdateInProgress", "status": "True"}]}
    assert WorkloadObject.parse_groups({**raw_groups(), "status": updating}).rolling
    held = of_kind("LeaderWorkerSet", made(paused=True))
    held["metadata"] |= {"uid": "groups-uid"}
    assert WorkloadObject.parse_groups({**held, "status": updating}).paused
    assert not WorkloadObject.parse_groups({**held, "status": updating}).rolling


def test_the_last_groups_are_stopped_first_as_their_controller_does() -> None:
    names = ("tiny-runtime-0", "tiny-runtime-1", "tiny-runtime-2")
    pods = tuple(leader(index, template_hash="") for index in range(3))
    views = tuple(runtime(name, in_flight=5 * index) for index, name in enumerate(names))
    many = observed(*pods, of=base(replicas=3, scaling={"maxReplicas": 3, "scaleDownDelay": "0s"}), runtimes=views)
    assert [item.meta.name for item in emptiest(many, 2)] == ["tiny-runtime-2", "tiny-runtime-1"]
    low = plan(replace(many, runtimes=tuple(runtime(name) for name in names)))
    assert (low.scale_to, low.deletion_costs) == (1, ())


# --- failures


def started(*, reason: str | None = None, retry_at: float | None = None, **more: Any) -> BaseModelStatus:
    start = StartStatus(since=iso(NOW), **more)
    failed = {"failures": 1, "reason": reason, "message": CRASH, "failed_at": iso(NOW + 60)} if reason else {}
    waits = {"retry_at": iso(retry_at)} if retry_at is not None else {}
    return BaseModelStatus(start=start.model_copy(update={**failed, **waits}))


def at(made_plan: BasePlan) -> StartStatus:
    assert made_plan.status is not None
    assert made_plan.status.start is not None
    return made_plan.status.start


def young(**more: Any) -> PodObject:
    return replace(worker(**more), meta=meta_of("tiny-runtime-0-1", "worker-uid", created_unix_s=NOW + 1))


@pytest.mark.parametrize("lowest", [0, 1])
def test_a_group_whose_process_fails_is_given_up_at_once_and_starts_again_after_a_wait_that_grows(lowest: int) -> None:
    of = base(started(), replicas=1, scaling={"minReplicas": lowest})
    failed = young(last_crash=CRASH, terminating=True, ready=False)  # its controller deletes the group already
    first = plan(observed(leader(ready=False, terminating=True), workers=(failed,), of=of), NOW + 60)
    assert (at(first).reason, at(first).failures) == (Reason.CRASH_LOOPING, 1)
    assert at(first).retry_at == iso(NOW + 120)
    assert first.requeue_at == NOW + 60  # its replicas are removed by the next plan, at once
    assert "NCCL error (Pod tiny-runtime-0-1)" in (at(first).message or "")

    assert first.status is not None
    then = plan(observed(of=replace(of, status=first.status)), NOW + 61)
    assert then.scale_to == 0
    stopped = base(first.status, replicas=0, scaling={"minReplicas": lowest})
    waiting = plan(observed(of=stopped), NOW + 62)
    assert waiting.scale_to is None
    assert condition(waiting, BaseCondition.STALLED) == ("True", Reason.CRASH_LOOPING)
    text = message(waiting, BaseCondition.READY)
    assert ("the first request after" in text) == (lowest == 0)
    again = plan(observed(of=stopped), NOW + 121)
    assert again.scale_to == (1 if lowest else None)


def test_a_second_group_that_fails_is_started_again_after_a_wait_that_grows_and_the_first_serves_on() -> None:
    of = base(replicas=2, scaling={"minReplicas": 2, "maxReplicas": 2})
    first, crash = leader(0), leader(1, ready=False, terminating=True, last_crash=CRASH)
    failed = replace(crash, meta=meta_of("tiny-runtime-1", "one", created_unix_s=NOW - 5))
    both = observed(first, failed, of=of, runtimes=(runtime("tiny-runtime-0"),))
    once = plan(both, NOW)
    assert (once.scale_to, once.memory.failing) == (1, FailingGroup(1, 1, NOW, NOW + 60))
    alone = replace(both, pods=(first,), base=base(replicas=1, scaling={"minReplicas": 2, "maxReplicas": 2}))
    waiting = plan(replace(alone, memory=once.memory), NOW + 30)
    assert (waiting.scale_to, waiting.memory.failing) == (None, once.memory.failing)
    assert waiting.requeue_at == NOW + 60
    again = plan(replace(alone, memory=once.memory), NOW + 60)
    assert again.scale_to == 2
    starts_again = replace(both, pods=(first, leader(1, ready=False)), memory=again.memory)
    assert plan(starts_again, NOW + 61).scale_to is None
    new = replace(failed, meta=replace(failed.meta, created_unix_s=NOW + 61))
    twice = plan(replace(both, pods=(first, new), memory=again.memory), NOW + 90)
    assert (twice.scale_to, twice.memory.failing) == (1, FailingGroup(1, 2, NOW + 90, NOW + 90 + 120))
    serves = replace(both, pods=(first, leader(1)), memory=twice.memory)
    assert plan(serves, NOW + 300).memory.failing is None


def test_a_failing_group_before_the_last_is_left_to_its_controller() -> None:
    of = base(replicas=2, scaling={"minReplicas": 2, "maxReplicas": 2})
    failed = leader(0, ready=False, terminating=True, last_crash=CRASH)
    both = observed(failed, leader(1), of=of, runtimes=(runtime("tiny-runtime-1"),))
    assert plan(both, NOW).scale_to is None


def test_what_a_failed_group_leaves_behind_is_no_failure_of_the_next_attempt() -> None:
    before = StartStatus(failures=1, reason="CrashLooping", message=CRASH, failed_at=iso(NOW + 2), since=iso(NOW + 4))
    left = young(last_crash=CRASH, terminating=True, ready=False)
    made_plan = plan(observed(workers=(left,), of=base(BaseModelStatus(start=before), replicas=1)), NOW + 5)
    assert (at(made_plan).failures, at(made_plan).retry_at) == (1, None)
    new = replace(left, meta=replace(left.meta, created_unix_s=NOW + 4))
    failed_again = plan(observed(workers=(new,), of=base(BaseModelStatus(start=before), replicas=1)), NOW + 60)
    assert at(failed_again).failures == 2
    assert at(failed_again).retry_at == iso(NOW + 60 + 120)


def test_the_failure_that_ends_a_group_which_served_is_answered_by_its_controller_alone() -> None:
    of = base(started(), replicas=1)
    served = replace(young(last_crash=CRASH), meta=meta_of("tiny-runtime-0-1", "w", created_unix_s=NOW - 3600))
    made_plan = plan(observed(leader(ready=False, terminating=True), workers=(served,), of=of), NOW + 1)
    assert (made_plan.scale_to, at(made_plan).retry_at, at(made_plan).reason) == (None, None, None)


def test_a_single_pod_that_fails_is_not_given_up_at_once() -> None:
    broken = pod(ready=False, problem=CRASH)
    made_plan = plan(world(base(started(), replicas=1), pods=(broken,), workload=deployment()), NOW + 60)
    assert (at(made_plan).reason, at(made_plan).retry_at) == (Reason.CRASH_LOOPING, None)


QUOTA = "FailedCreate: create Pod tiny-runtime-0-1 in StatefulSet failed: pods is forbidden: exceeded quota: team"


def test_pods_of_a_group_that_a_quota_refuses_have_a_condition_of_their_own() -> None:
    of = base(started(), replicas=1)
    waits = observed(leader(ready=False), of=of, short_sets=("set-uid",))
    first = plan(waits, NOW + 30)
    assert first.read_refusals == ("set-uid",)
    read = replace(waits, pods_refused=QUOTA, refusals_read_unix_s=NOW + 30)
    then = plan(read, NOW + 31)
    assert condition(then, BaseCondition.READY) == ("False", Reason.QUOTA_EXCEEDED)
    assert "exceeded quota: team" in message(then, BaseCondition.READY)
    assert then.read_refusals == ()
    assert plan(read, NOW + 41).read_refusals == ("set-uid",)
    without_leader = replace(read, pods=())
    assert condition(plan(without_leader, NOW + 31), BaseCondition.READY) == ("False", Reason.QUOTA_EXCEEDED)


@pytest.mark.parametrize("lowest", [0, 1])
def test_a_runtime_that_says_that_it_cannot_start_is_given_up_at_once(lowest: int) -> None:
    of = base(started(), replicas=1, scaling={"minReplicas": lowest})
    broken = pod(ready=False, problem="DeviceUnusable: the container ended with exit code 1 (Error). too old")
    made_plan = plan(world(of, pods=(broken,), workload=deployment()), NOW + 60)
    assert (at(made_plan).reason, at(made_plan).retry_at) == (Reason.DEVICE_UNUSABLE, iso(NOW + 120))
    assert made_plan.status is not None
    then = plan(world(replace(of, status=made_plan.status), workload=deployment()), NOW + 61)
    assert then.scale_to == 0


def test_a_lost_worker_is_a_condition_that_says_what_to_do() -> None:
    lost = young(disruption="DeletionByTaintManager", terminating=True, ready=False)
    stuck = observed(leader(ready=False, terminating=True), workers=(lost,), of=base(started(), replicas=1))
    made_plan = plan(stuck, NOW + 60)
    assert condition(made_plan, BaseCondition.READY) == ("False", Reason.WORKER_LOST)
    text = message(made_plan, BaseCondition.READY)
    assert "Kubernetes ends Pod tiny-runtime-0-1 (DeletionByTaintManager)" in text
    assert "delete the Node object" in text
    assert (made_plan.scale_to, at(made_plan).retry_at) == (None, None)


def test_a_worker_that_cannot_be_scheduled_or_is_not_ready_is_named() -> None:
    of = base(started(), replicas=1)
    waits = young(ready=False, problem="Unschedulable: 0/2 nodes are available")
    made_plan = plan(observed(leader(ready=False), workers=(waits,), of=of), NOW + 601)
    assert condition(made_plan, BaseCondition.READY) == ("False", Reason.UNSCHEDULABLE)
    starting = plan(observed(leader(ready=False), workers=(young(ready=False),), of=of), NOW + 1)
    assert "Not ready: worker tiny-runtime-0-1." in message(starting, BaseCondition.READY)


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        ({"exitCode": 135}, Reason.SHARED_MEMORY_FULL),
        (
            {"exitCode": 1, "message": "OSError: [Errno 28] No space left on device: '/dev/shm/nccl-x'"},
            "SharedMemoryFull",
        ),
        ({"exitCode": 137, "reason": "OOMKilled"}, Reason.OUT_OF_MEMORY),
        ({"exitCode": 1, "message": "anything"}, Reason.CRASH_LOOPING),
    ],
)
def test_how_a_process_failed_is_known_after_its_restart(ended: dict[str, Any], reason: str) -> None:
    status = {"containerStatuses": [{"restartCount": 1, "state": {"running": {}}, "lastState": {"terminated": ended}}]}
    assert reason_of(last_crash(status)) == reason
    fine = {"containerStatuses": [{"restartCount": 1, "lastState": {"terminated": {"exitCode": 0}}}]}
    assert last_crash(fine) == last_crash({}) == ""


def test_the_annotation_with_the_hash_is_on_the_leader_alone() -> None:
    template = group_template()
    assert ANNOTATION_TEMPLATE_HASH in template["leaderTemplate"]["metadata"]["annotations"]
    assert ANNOTATION_TEMPLATE_HASH not in template["workerTemplate"]["metadata"]["annotations"]
