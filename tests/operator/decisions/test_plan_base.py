"""Plans of bases: each test states the whole world in one literal and asserts what is decided."""

from __future__ import annotations

from dataclasses import replace

import pytest
from base_world import (
    IMAGE,
    KEY,
    NOW,
    base,
    condition,
    deployment,
    inspected,
    message,
    meta,
    plan,
    pod,
    runtime,
    world,
)
from fakes_operator import digest

from lorapool_api.common import AdapterKey, FailureReason, Reason
from lorapool_api.protocol import BaseReport
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.manifests import children
from lorapool_operator.world.cluster_cache import Key, ObjectKind
from lorapool_operator.world.observed import (
    AdapterSummary,
    BaseMemory,
    ChildProblem,
    RunningInspection,
    SourceFailure,
    StrayReport,
)
from lorapool_operator.world.profiles import RuntimeImage, RuntimeProfile


def test_a_new_base_is_inspected_first_and_then_started_once() -> None:
    first = plan(world(inspection=None))
    assert first.inspect is not None
    assert first.children == ()
    assert first.status is None
    made = plan(world())
    assert [child["kind"] for child in made.children] == ["ConfigMap", "Deployment", "Service", "PodDisruptionBudget"]
    assert made.scale_to == 1
    assert condition(made, "SourceResolved") == ("True", "Resolved")
    assert condition(made, "Ready") == ("False", "Starting")


def test_a_base_that_is_being_deleted_gets_no_children() -> None:
    leaving = replace(base(replicas=1), meta=meta("tiny", "base-uid", deleting=True))
    assert plan(world(leaving)).children == ()


def test_children_are_applied_once_and_again_only_for_a_reason() -> None:
    observed = world(base(replicas=1), workload=deployment())
    known = plan(observed).children_hash
    assert plan(replace(observed, applied_hash=known)).children == ()
    assert plan(replace(observed, applied_hash=known, apply_again=True)).children
    assert plan(replace(observed, applied_hash=known, workload=None)).children
    assert plan(replace(observed, applied_hash=known, image=RuntimeImage("runtime:2", "Always"))).children


def test_a_serving_replica_makes_the_base_ready() -> None:
    made = plan(world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment()))
    assert condition(made, "RuntimeAvailable") == ("True", "Available")
    assert condition(made, "Ready") == ("True", "Ready")
    assert condition(made, "Progressing") == ("False", "Stable")
    assert made.status is not None
    assert (made.status.replicas, made.status.ready_replicas, made.status.state) == (1, 1, "Ready")
    assert [(item.name, item.boot_id, item.ready) for item in made.status.pods] == [("pod", "boot-pod", True)]


def test_a_base_at_zero_replicas_is_ready_since_a_request_starts_one() -> None:
    made = plan(world(base(replicas=0)))
    assert condition(made, "Ready") == ("True", "ScaledToZero")
    assert condition(made, "RuntimeAvailable") == ("False", "ScaledToZero")
    assert made.children[1]["spec"]["replicas"] == 0


def test_a_pod_that_cannot_run_is_quoted() -> None:
    broken = pod(ready=False, problem="ImagePullBackOff: no such tag")
    made = plan(world(base(replicas=1), pods=(broken,), workload=deployment()))
    assert condition(made, "Ready") == ("False", "ImagePullFailed")
    assert made.status is not None
    assert "ImagePullBackOff" in next(item.message for item in made.status.conditions if item.type == "Ready")
    assert [note.reason for note in made.events] == ["ImagePullFailed"]


def test_one_of_two_is_degraded_but_available() -> None:
    made = plan(
        world(
            base(replicas=2, scaling={"maxReplicas": 2}),
            pods=(pod("a"), pod("b", ready=False)),
            runtimes=(runtime("a", in_flight=20),),
        )
    )
    assert condition(made, "RuntimeAvailable") == ("True", "Degraded")
    assert condition(made, "Ready") == ("True", "Ready")


def test_a_source_that_is_gone_starts_no_pod_but_stops_none_that_serves() -> None:
    gone = inspected(SourceFailure(FailureReason.SOURCE_NOT_FOUND, "404; correct the uri"))
    made = plan(world(inspection=gone))
    assert made.children == ()
    assert condition(made, "Ready") == ("False", "SourceNotFound")
    serving = plan(world(base(replicas=1), inspection=gone, pods=(pod(),), runtimes=(runtime(),)))
    assert serving.children
    assert condition(serving, "Ready") == ("True", "Ready")


def test_a_source_that_is_down_is_inspected_again_and_the_runtime_starts_meanwhile() -> None:
    observed = world(inspection=inspected(SourceFailure(FailureReason.SOURCE_UNAVAILABLE, "502")))
    made = plan(observed)
    assert made.inspect is None
    assert made.children
    assert made.requeue_at is not None
    again = plan(observed, NOW + 10).inspect
    assert again is not None
    assert again.attempt == 2


def test_a_volume_is_read_only_by_runtimes() -> None:
    of = base(source={"uri": "pvc://models/base"}, replicas=1)
    made = plan(world(of, inspection=None))
    assert made.inspect is None
    assert made.children
    assert condition(made, "SourceResolved") == ("Unknown", "AwaitingRuntime")
    report = BaseReport(served_name="t", max_model_len=64, dtype="f", digest=digest("claim"))
    loaded = plan(world(of, inspection=None, pods=(pod(),), runtimes=(runtime(base=report),)))
    assert loaded.status is not None
    assert loaded.status.digest == digest("claim")


def test_warm_adapters_keep_a_replica_up() -> None:
    warm = AdapterSummary(ready=True, loaded=False, failed=False, warm_replicas=1)
    assert plan(world(base(replicas=0), adapters=(warm,))).scale_to == 1
    idle = world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), adapters=(warm,))
    assert plan(idle, NOW + 10_000).scale_to is None


def test_an_idle_base_scales_to_zero_and_an_event_says_so() -> None:
    observed = world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    assert plan(observed, NOW + 599).requeue_at == NOW + 600
    made = plan(observed, NOW + 600)
    assert made.scale_to == 0
    assert made.children[1]["spec"]["replicas"] == 0
    assert [note.reason for note in made.events] == ["Scaled"]


def test_a_recent_wake_up_is_not_reverted() -> None:
    asked = world(base(replicas=1, scaling={"idleAfter": "2s"}), woken_unix_s=NOW + 5000)
    assert plan(asked, NOW + 5100).scale_to is None


def test_adapters_are_counted() -> None:
    many = (
        AdapterSummary(True, True, False, 0),
        AdapterSummary(True, False, False, 0),
        AdapterSummary(False, False, True, 0),
    )
    status = plan(world(adapters=many)).status
    assert status is not None
    assert status.adapters.model_dump() == {"total": 3, "ready": 2, "loaded": 1, "failed": 1}


def test_the_deployment_of_a_deleted_base_is_removed_before_a_new_one_is_applied() -> None:
    made = plan(world(workload=deployment(owner="former-uid")))
    assert [item.meta.uid for item in made.remove] == ["deployment-uid"]
    assert made.children == ()


def test_a_base_without_its_profile_gets_no_children() -> None:
    made = plan(world(profile=None))
    assert made.children == ()
    assert condition(made, "Ready") == ("False", "ProfileNotFound")


def test_a_profile_of_other_namespaces_is_refused_with_its_own_reason() -> None:
    made = plan(world(profile=None, profile_denied=True))
    assert made.children == ()
    assert condition(made, "Ready") == ("False", "ProfileNotPermitted")


@pytest.mark.parametrize(("age_s", "removed"), [(9.0, 0), (10.0, 1)])
def test_a_stray_is_unregistered_only_after_a_while_and_only_if_its_object_is_gone(age_s: float, removed: int) -> None:
    stray = StrayReport("pod-uid", "pod", AdapterKey("x", digest("x")), "team/x", NOW - age_s)
    made = plan(world(strays=(stray,)))
    assert len(made.unregisters) == removed
    assert all(item.verify for item in made.unregisters)


def test_nothing_is_written_when_nothing_changed() -> None:
    observed = world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    first = plan(observed)
    held = replace(observed, base=base(first.status, replicas=1), applied_hash=first.children_hash)
    second = plan(held, NOW + 1)
    assert (second.status, second.children, second.scale_to, second.events) == (None, (), None, ())


def test_the_plan_applies_what_the_manifests_make() -> None:
    wanted = children(
        base(), RuntimeProfile(), IMAGE, replicas=1, token_sha256=("ab" * 32,), rules=SourceRules(owner="team")
    )
    assert list(plan(world()).children) == wanted


@pytest.mark.parametrize("uri", ["hf://org/base", "pvc://models/base"])
def test_after_a_restart_a_resolved_source_is_not_inspected_again(uri: str) -> None:
    of = base(source={"uri": uri}, replicas=1)
    report = BaseReport(served_name="t", max_model_len=64, dtype="f", digest=digest("base"))
    resolved = plan(world(of, pods=(pod(),), runtimes=(runtime(base=report),), workload=deployment())).status
    assert resolved is not None
    stopped = world(replace(of, status=resolved), inspection=None, workload=deployment())
    made = plan(stopped)
    assert made.inspect is None
    assert condition(made, "SourceResolved") == ("True", "Resolved")
    assert made.status is not None
    assert made.status.digest == digest("base")


def test_an_inspection_job_has_the_whole_question_and_one_runs_at_a_time() -> None:
    of = base(source={"uri": "hf://org/base", "revision": "v1"})
    job = plan(world(of, inspection=None)).inspect
    assert job is not None
    assert (job.key, job.uid, job.fingerprint, job.attempt) == (KEY, "base-uid", "base-uid/", 1)
    assert (job.uri, job.revision, job.digest, job.base_uid) == ("hf://org/base", "v1", None, None)
    assert plan(world(of, inspection=None, running=RunningInspection("base-uid/", None))).inspect is None


def test_the_retry_annotation_starts_another_first_attempt() -> None:
    gone = inspected(SourceFailure(FailureReason.TOO_LARGE, "300 GB"))
    assert plan(world(inspection=gone), NOW + 10_000).inspect is None
    of = replace(base(), meta=replace(base().meta, retry="1"))
    job = plan(world(of, inspection=gone)).inspect
    assert job is not None
    assert (job.attempt, job.fingerprint) == (1, "base-uid/1")


def test_the_wait_that_the_source_asks_for_is_kept() -> None:
    limited = world(inspection=inspected(SourceFailure(FailureReason.RATE_LIMITED, "429", 60.0)))
    assert plan(limited).requeue_at == NOW + 59
    assert plan(limited, NOW + 58.9).inspect is None
    assert plan(limited, NOW + 59).inspect is not None


def test_a_deployment_that_cannot_create_pods_is_quoted() -> None:
    refused = replace(deployment(), problem="FailedCreate: quota exceeded")
    made = plan(world(base(replicas=1), workload=refused, pods=(pod(ready=False, terminating=True, problem="old"),)))
    assert made.status is not None
    messages = {item.type: item.message for item in made.status.conditions}
    assert messages["Ready"] == "FailedCreate: quota exceeded"


def test_the_load_of_a_base_counts_every_runtime_that_answers() -> None:
    of = base(replicas=2, scaling={"maxReplicas": 9, "targetInFlight": 4})
    busy = (runtime("a", in_flight=5, waiting=4), runtime("b", in_flight=3), runtime("c", fresh=False, in_flight=50))
    made = plan(world(of, pods=(pod("a"), pod("b")), runtimes=busy))
    assert made.scale_to == 3
    assert made.events[0].message == "From 2 to 3: 12 requests in flight."


def test_a_base_with_a_recent_request_on_any_replica_is_not_idle() -> None:
    of = base(replicas=1)
    used = (runtime(last_request_unix_s=NOW + 500.0),)
    observed = world(of, pods=(pod(),), runtimes=used, workload=deployment())
    assert plan(observed, NOW + 1099).scale_to is None
    assert plan(observed, NOW + 1100).scale_to == 0


def test_the_last_use_is_written_once_per_interval() -> None:
    of = base(replicas=1)
    known = {"pods": (pod(),), "workload": deployment()}
    first = plan(world(of, runtimes=(runtime(last_request_unix_s=NOW),), **known))
    assert first.status is not None
    assert first.status.last_used == "2023-11-14T22:13:20Z"
    held = replace(of, status=first.status)
    soon = plan(world(held, runtimes=(runtime(last_request_unix_s=NOW + 30.0),), **known), NOW + 30)
    assert (soon.status, soon.requeue_at) == (None, NOW + 60)
    due = plan(world(held, runtimes=(runtime(last_request_unix_s=NOW + 60.0),), **known), NOW + 61)
    assert due.status is not None
    assert due.status.last_used == "2023-11-14T22:14:20Z"


QUOTA = ChildProblem(Reason.QUOTA_EXCEEDED, "Deployment tiny-runtime: exceeded quota: gpus")


def test_an_edit_to_an_unknown_profile_shows_on_a_base_that_serves() -> None:
    running = {"pods": (pod(),), "runtimes": (runtime(),), "workload": deployment()}
    before = base(plan(world(base(replicas=1), **running)).status, replicas=1, runtimeProfile="nope")
    made = plan(world(before, profile=None, **running))
    assert condition(made, "Ready") == ("True", "Degraded")
    assert condition(made, "Progressing") == ("False", "ProfileNotFound")
    assert condition(made, "Stalled") == ("True", "ProfileNotFound")
    assert "'nope'" in message(made, "Ready")
    assert {(note.type, note.reason) for note in made.events} == {
        ("Warning", "Degraded"),
        ("Warning", "ProfileNotFound"),
    }


def test_a_base_without_its_profile_keeps_the_number_of_its_pods() -> None:
    idle = world(base(replicas=1), profile=None, pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    assert plan(idle, NOW + 10_000).scale_to is None


@pytest.mark.parametrize("serving", [True, False])
def test_children_that_the_api_server_refuses_are_reported(serving: bool) -> None:
    pods = {"pods": (pod(),), "runtimes": (runtime(),)} if serving else {}
    made = plan(world(base(replicas=int(serving)), child_problem=QUOTA, workload=deployment(), **pods))
    assert condition(made, "Ready") == (("True", "Degraded") if serving else ("False", "QuotaExceeded"))
    assert condition(made, "Progressing") == ("False", "QuotaExceeded")
    assert condition(made, "Stalled") == ("True", "QuotaExceeded")
    assert "exceeded quota: gpus" in message(made, "Ready")
    assert ("Warning", "QuotaExceeded") in [(note.type, note.reason) for note in made.events]


def test_a_refused_apply_is_tried_again_after_its_back_off_or_a_change() -> None:
    refused = world(base(replicas=1), child_problem=QUOTA, apply_retry_unix_s=NOW + 40)
    refused = replace(refused, applied_hash=plan(refused).children_hash, apply_again=True)
    early = plan(refused, NOW + 39)
    assert (early.children, early.requeue_at) == ((), NOW + 40)
    assert plan(refused, NOW + 40).children
    assert plan(replace(refused, image=RuntimeImage("runtime:2", "Always")), NOW + 1).children


def test_the_waits_for_a_refused_apply_grow_up_to_five_minutes() -> None:
    memory, waits = BaseMemory("base-uid", 1), []
    for _ in range(8):
        memory.children_applied("hash", QUOTA, NOW)
        waits.append(memory.apply_retry_unix_s - NOW)
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300]
    assert memory.children_applied("hash", None, NOW)
    assert memory.children_applied("hash", QUOTA, NOW)
    assert memory.apply_retry_unix_s == NOW + 5


def test_a_changed_profile_is_an_event() -> None:
    running = world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    assert plan(running).events == ()
    made = plan(replace(running, profile_changed=True))
    assert [(note.type, note.reason) for note in made.events] == [("Normal", "ProfileChanged")]


def test_profiles_that_cannot_be_read_are_a_condition_and_an_event_and_change_nothing_else() -> None:
    running = world(base(replicas=1), pods=(pod(),), runtimes=(runtime(),), workload=deployment())
    usual, made = plan(running), plan(replace(running, profiles_problem="profiles.yaml: profiles.a: no such field"))
    assert condition(made, "Stalled") == ("True", "ProfilesUnreadable")
    assert "profiles.a: no such field. Correct the chart's value runtimeProfiles." in message(made, "Stalled")
    assert [(note.type, note.reason) for note in made.events] == [("Warning", "ProfilesUnreadable")]
    assert condition(made, "Ready") == condition(usual, "Ready")
    assert made.children == usual.children


def test_a_served_name_that_another_object_has_is_a_condition() -> None:
    holder = Key(ObjectKind.ADAPTER, "team", "older")
    made = plan(world(base(replicas=0, servedName="fast"), name_holder=holder))
    assert condition(made, "NameConflict") == ("True", "AliasTaken")
    assert "LoraAdapter team/older" in message(made, "NameConflict")


def test_a_missing_source_is_inspected_again_and_a_terminal_one_says_how() -> None:
    gone = world(inspection=inspected(SourceFailure(FailureReason.SOURCE_NOT_FOUND, "404; correct the uri")))
    assert plan(gone, NOW + 10).inspect is not None
    made = plan(world(inspection=inspected(SourceFailure(FailureReason.TOO_LARGE, "300 GB; raise the bound"))))
    assert message(made, "Ready").startswith("300 GB; raise the bound")
    assert "lorapool.dev/retry" in message(made, "Ready")
    assert condition(made, "Stalled") == ("True", "TooLarge")


def test_a_base_whose_source_refused_access_is_inspected_at_once_when_the_credentials_change() -> None:
    refused = replace(inspected(SourceFailure(FailureReason.UNAUTHORIZED, "401")), began_unix_s=NOW - 2)
    made = plan(world(inspection=refused))
    assert made.inspect is None
    assert "mounted credentials" in message(made, "Ready")
    assert plan(world(inspection=refused, credentials_unix_s=NOW - 3)).inspect is None
    assert plan(world(inspection=refused, credentials_unix_s=NOW)).inspect is not None
    assert plan(world(inspection=refused), NOW + 600).inspect is not None


def test_a_new_pod_without_a_node_is_named_while_the_old_one_serves() -> None:
    waiting = pod("new", ready=False, problem="Unschedulable: 3 Insufficient nvidia.com/gpu.")
    made = plan(world(base(replicas=1), pods=(pod("old"), waiting), runtimes=(runtime("old"),)))
    assert condition(made, "Ready") == ("True", "Ready")
    assert condition(made, "Progressing") == ("True", "Starting")
    assert "Insufficient nvidia.com/gpu" in message(made, "Progressing")


def test_idleness_is_measured_on_one_clock() -> None:
    behind = runtime(started_unix_s=NOW - 120, last_request_unix_s=NOW + 997 - 120)
    of = base(replicas=1, scaling={"idleAfter": "90s"})
    observed = world(of, pods=(pod(),), runtimes=(replace(behind, skew_s=120.0),), workload=deployment())
    assert plan(observed, NOW + 1000).scale_to is None
    assert plan(observed, NOW + 1087).scale_to == 0


def test_a_base_whose_start_takes_longer_than_its_idle_time_is_not_idle_once_it_is_ready() -> None:
    slow = runtime(started_unix_s=NOW, ready_unix_s=NOW + 1200)
    of = base(replicas=1, scaling={"idleAfter": "90s"})
    observed = world(of, pods=(pod(),), runtimes=(slow,), workload=deployment())
    assert plan(observed, NOW + 1201).scale_to is None
    assert plan(observed, NOW + 1291).scale_to == 0


def test_no_more_pods_run_than_the_owner_allows_whatever_an_autoscaler_asks_for() -> None:
    scaling = {"mode": "External", "maxReplicas": 2}
    two = tuple(runtime(f"p{number}", in_flight=1) for number in range(2))
    made = plan(world(base(replicas=5, scaling=scaling), pods=(pod("p0"), pod("p1")), runtimes=two))
    assert made.scale_to is None
    assert made.children[1]["spec"]["replicas"] == 2
    assert condition(made, "RuntimeAvailable") == ("True", "Available")
    assert condition(made, "Progressing") == ("False", "Stable")


def test_a_lower_bound_than_the_present_number_takes_effect_under_load() -> None:
    busy = tuple(runtime(f"p{number}", in_flight=50) for number in range(3))
    pods = tuple(pod(f"p{number}") for number in range(3))
    assert plan(world(base(replicas=3, scaling={"maxReplicas": 2}), pods=pods, runtimes=busy)).scale_to == 2
