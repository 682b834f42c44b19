"""Plans of adapters: each test states the whole world in one literal and asserts what is decided."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from adapter_world import (
    NEW,
    NOW,
    OLD,
    adapter,
    base,
    condition,
    good,
    inspected,
    meta,
    plan,
    replica,
    report,
    settled,
    text_of,
    types,
)

from lorapool_api.basemodel import AdapterDefaults, BaseModelStatus
from lorapool_api.common import AdapterKey, FailureReason
from lorapool_api.loraadapter import LoraAdapterStatus, PlacementStatus, UsagePart
from lorapool_api.placement import Replica, placement_order
from lorapool_api.protocol import AdapterReport, AdapterState, ErrorDetail, SourceRef, Tier
from lorapool_operator.decisions.plan import AdapterPlan, Unregister
from lorapool_operator.decisions.plan_adapter import BASE_GRACE_S
from lorapool_operator.decisions.validity import RETRY_HINT
from lorapool_operator.world import observed
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject
from lorapool_operator.world.observed import (
    AdapterOnReplica,
    InspectionResult,
    ObservedAdapter,
    RunningInspection,
    SourceFacts,
    SourceFailure,
    SpreadMemory,
    adapter_fingerprint,
)


def test_a_new_adapter_is_inspected_and_no_status_is_written_meanwhile() -> None:
    made = plan(ObservedAdapter(adapter(), base()))
    assert made.inspect is not None
    assert (made.inspect.uri, made.inspect.attempt) == ("hf://org/a", 1)
    assert made.status is None


def test_an_inspection_that_takes_long_shows_as_pending() -> None:
    one = adapter()
    observed = ObservedAdapter(one, base(), running=RunningInspection(adapter_fingerprint(one, base()), NOW - 4.0))
    assert plan(observed).status is None
    assert plan(observed).requeue_at == NOW + 1.0
    made = plan(observed, NOW + 1.0)
    assert condition(made, "Ready") == ("Unknown", "Pending")


def test_an_idle_adapter_is_ready_and_not_loaded() -> None:
    one = settled(adapter(), base())
    assert one.status.state == "Parked"
    assert {item.type: item.status for item in one.status.conditions} == {
        "Resolved": "True", "Compatible": "True", "Loaded": "False", "Ready": "True", "Progressing": "False",
    }  # fmt: skip


def never_run() -> BaseObject:
    return replace(base(), status=BaseModelStatus())


def test_before_a_runtime_of_the_base_ran_an_adapter_is_ready_but_not_said_to_fit() -> None:
    one = settled(adapter(), never_run())
    states = {item.type: (item.status, item.reason) for item in one.status.conditions}
    assert states["Compatible"] == ("Unknown", "NotChecked")
    assert states["Resolved"] == ("True", "Resolved")
    assert states["Ready"] == ("True", "Parked"), "a request starts the base, whose runtime checks it"
    assert plan(ObservedAdapter(one, never_run())) == AdapterPlan()


def test_once_the_base_is_known_an_unchecked_adapter_is_inspected_and_keeps_being_served() -> None:
    one = settled(adapter(), never_run())
    made = plan(ObservedAdapter(one, base(), replicas=(replica(report()),)))
    assert made.inspect is not None
    assert condition(made, "Ready")[0] == "True"
    fits = plan(ObservedAdapter(one, base(), inspection=inspected(good(), one, base())))
    assert condition(fits, "Compatible") == ("True", "Compatible")


def test_an_unchecked_adapter_that_turns_out_not_to_fit_is_not_ready() -> None:
    one = settled(adapter(), never_run())
    misfit = SourceFailure(FailureReason.WRONG_BASE, "64x64 in the base but the adapter fits 16x16")
    made = plan(ObservedAdapter(one, base(), inspection=inspected(misfit, one, base())))
    assert condition(made, "Compatible") == ("False", "WrongBase")
    assert condition(made, "Ready") == ("False", "WrongBase")
    down = SourceFailure(FailureReason.SOURCE_UNAVAILABLE, "502 from the hub")
    kept = plan(ObservedAdapter(one, base(), inspection=inspected(down, one, base())))
    assert kept.status is None or condition(kept, "Ready")[0] == "True"


def test_nothing_is_written_when_nothing_changed() -> None:
    one = settled(adapter(), base())
    assert plan(ObservedAdapter(one, base())) == AdapterPlan()
    assert plan(ObservedAdapter(one, base(), replicas=(replica(),))) == AdapterPlan()


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (replica(report()), ("True", "Loaded")),
        (replica(report(), terminating=True), ("False", "Parked")),
        (replica(report(AdapterState.LOADING)), ("False", "Loading")),
        (replica(report(AdapterState.REGISTERED)), ("False", "Parked")),
        (replica(report(AdapterState.DRAINING, tier=Tier.DEVICE)), ("False", "Parked")),
        (replica(report(), fresh=False), ("Unknown", "Unavailable")),
        (replica(report(of=NEW)), ("False", "Parked")),
    ],
)
def test_loaded_is_true_only_for_this_digest_on_a_device_of_a_runtime_that_answers(
    where: AdapterOnReplica, expected: tuple[str, str]
) -> None:
    one = settled(adapter(), base())
    made = plan(ObservedAdapter(one, base(), replicas=(where,)))
    held = next((item.status, item.reason) for item in (made.status or one.status).conditions if item.type == "Loaded")
    assert held == expected


def test_a_lost_runtime_is_reported_until_another_serves() -> None:
    one = settled(adapter(), base())
    loaded = plan(ObservedAdapter(one, base(), replicas=(replica(report()),))).status
    assert loaded is not None
    lost = plan(ObservedAdapter(replace(one, status=loaded), base()))
    assert condition(lost, "Loaded") == ("False", "RuntimeRestarted")
    assert lost.status is not None
    assert (lost.status.replicas, lost.status.loaded) == ([], "0/1")
    back = plan(ObservedAdapter(replace(one, status=lost.status), base(), replicas=(replica(pod="pod-2"),)))
    assert condition(back, "Loaded") == ("False", "Parked")
    asleep = plan(ObservedAdapter(replace(one, status=loaded), base(replicas=0)))
    assert condition(asleep, "Loaded") == ("False", "Parked")


def test_a_transient_failure_is_inspected_again_after_a_back_off() -> None:
    one, on = adapter(), base()
    down = inspected(SourceFailure(FailureReason.SOURCE_UNAVAILABLE, "502"), one, on)
    made = plan(ObservedAdapter(one, on, inspection=down))
    assert condition(made, "Ready") == ("False", "SourceUnavailable")
    assert made.status is not None
    assert made.status.failure is not None
    assert made.status.failure.retry_at is not None
    assert made.requeue_at is not None
    assert 2.5 <= made.requeue_at - down.at_unix_s <= 6.0
    waiting = ObservedAdapter(replace(one, status=made.status), on, inspection=down)
    assert plan(waiting, NOW + 1).inspect is None
    again = plan(waiting, made.requeue_at + 0.1).inspect
    assert again is not None
    assert again.attempt == 2


def test_after_a_restart_the_recorded_wait_is_kept() -> None:
    one, on = adapter(), base()
    made = plan(
        ObservedAdapter(one, on, inspection=inspected(SourceFailure(FailureReason.RATE_LIMITED, "429", 60.0), one, on))
    )
    assert made.status is not None
    assert made.requeue_at is not None
    assert made.requeue_at >= NOW + 58
    after_restart = plan(ObservedAdapter(replace(one, status=made.status), on), NOW + 10)
    assert (after_restart.inspect, after_restart.requeue_at) == (None, made.requeue_at)


@pytest.mark.parametrize("reason", [reason for reason in FailureReason if not reason.repeated])
def test_a_terminal_failure_is_not_inspected_again_until_its_inputs_change(reason: FailureReason) -> None:
    one, on = adapter(), base()
    made = plan(ObservedAdapter(one, on, inspection=inspected(SourceFailure(reason, "it is bad"), one, on)))
    assert condition(made, "Ready") == ("False", reason.value)
    assert made.status is not None
    assert made.status.failure is not None
    assert made.status.failure.retry_at is None
    failed = replace(one, status=made.status)
    assert plan(ObservedAdapter(failed, on), NOW + 10_000) == AdapterPlan()
    annotated = replace(failed, meta=replace(failed.meta, retry="again"))
    assert plan(ObservedAdapter(annotated, on)).inspect is not None


def test_the_old_digest_serves_until_the_new_one_is_loaded() -> None:
    on = base()
    one = settled(adapter(), on)
    changed = adapter(one.status, source={"uri": "hf://org/b"})
    inspection = inspected(good(NEW), changed, on)
    rollout = plan(ObservedAdapter(changed, on, replicas=(replica(report()),), inspection=inspection))
    assert [
        (str(item.adapter.digest), item.descriptor.load) for item in rollout.registers if item.adapter.digest == NEW
    ] == [(NEW, True)]
    assert rollout.unregisters == ()
    assert condition(rollout, "Progressing") == ("True", "Loading")
    assert rollout.status is not None
    assert rollout.status.digest == OLD
    both = (replica(report(), report(of=NEW)),)
    switched = plan(ObservedAdapter(replace(changed, status=rollout.status), on, replicas=both, inspection=inspection))
    assert switched.status is not None
    assert (switched.status.digest, switched.status.source_uri) == (NEW, "hf://org/b")
    assert [note.reason for note in switched.events] == ["Switched"]
    drained = plan(ObservedAdapter(replace(changed, status=switched.status), on, replicas=both, inspection=inspection))
    assert [item.adapter.digest for item in drained.unregisters] == [OLD]


def test_an_old_digest_in_use_is_not_unregistered() -> None:
    on = base()
    one = settled(adapter(source={"uri": "hf://org/b"}), on, good(NEW))
    busy = replica(report(in_flight=1, last_used_unix_s=NOW - 60), report(of=NEW))
    made = plan(ObservedAdapter(one, on, replicas=(busy,)))
    assert made.unregisters == ()
    assert made.requeue_at == NOW + 1.0


def test_a_base_without_replicas_switches_to_the_new_files_at_once() -> None:
    on = base(replicas=0)
    one = settled(adapter(), on)
    changed = adapter(one.status, source={"uri": "hf://org/b"})
    made = plan(ObservedAdapter(changed, on, inspection=inspected(good(NEW), changed, on)))
    assert made.status is not None
    assert made.status.digest == NEW


@pytest.mark.parametrize("how", ["inspection", "runtime", "rank"])
def test_when_the_new_files_fail_the_old_keep_serving(how: str) -> None:
    on = base(lora={"maxRank": 8})
    one = settled(adapter(), on)
    changed = adapter(one.status, source={"uri": "hf://org/b"})
    outcome: SourceFacts | SourceFailure = good(NEW, rank=64 if how == "rank" else 8)
    if how == "inspection":
        outcome = SourceFailure(FailureReason.INCOMPATIBLE, "lora_B is missing")
    detail = ErrorDetail(reason="NonFiniteWeights", message="NaN")
    new = (report(AdapterState.FAILED, NEW, failure=detail),) if how == "runtime" else ()
    observed = ObservedAdapter(
        changed, on, replicas=(replica(report(), *new),), inspection=inspected(outcome, changed, on)
    )
    made = plan(observed)
    assert condition(made, "Progressing") == ("False", "RolloutFailed")
    assert condition(made, "Ready") == ("True", "Loaded")
    assert made.status is not None
    assert (made.status.digest, made.status.state) == (OLD, "RolloutFailed")
    later = plan(replace(observed, adapter=replace(changed, status=made.status)))
    assert later.status is None
    assert later.inspect is None
    restarted = ObservedAdapter(replace(changed, status=made.status), on, replicas=observed.replicas)
    assert plan(restarted).inspect is None


def test_a_base_with_other_weights_gives_up_the_old_digest() -> None:
    one = settled(adapter(), base())
    other = replace(base(), meta=meta("tiny", "another-uid"))
    wrong = InspectionResult(
        adapter_fingerprint(one, other), 1, SourceFailure(FailureReason.WRONG_BASE, "shapes"), NOW, 0.5
    )
    made = plan(ObservedAdapter(one, other, inspection=wrong))
    assert condition(made, "Ready") == ("False", "WrongBase")
    assert made.status is not None
    assert made.status.digest is None


@pytest.mark.parametrize(
    ("one", "on", "reason"),
    [
        (adapter(suspend=True), base(), "Suspended"),
        (
            adapter(baseModelRef={"name": "tiny", "namespace": "others"}),
            replace(base(), meta=meta("tiny", "base-uid", namespace="others")),
            "NotPermitted",
        ),
    ],
)
def test_an_adapter_that_must_not_be_served_is_unregistered_from_every_runtime(
    one: AdapterObject, on: BaseObject | None, reason: str
) -> None:
    made = plan(ObservedAdapter(one, on, replicas=(replica(report(in_flight=3)),)))
    assert condition(made, "Ready") == ("False", reason)
    assert [item.adapter.digest for item in made.unregisters] == [OLD]
    assert made.registers == ()
    assert made.inspect is None


@pytest.mark.parametrize("age_s", [1.0, 10.0])
def test_nothing_tells_a_guest_whether_a_foreign_base_exists(age_s: float) -> None:
    one = adapter(baseModelRef={"name": "tiny", "namespace": "others"})
    one = replace(one, meta=replace(one.meta, created_unix_s=NOW - age_s))
    secret = base(adapterDefaults={"minReplicas": 2}, scaling={"maxReplicas": 4})
    secret = replace(secret, meta=meta("tiny", "base-uid", namespace="others"))
    exists, missing = plan(ObservedAdapter(one, secret)), plan(ObservedAdapter(one, None))
    assert (exists.status, exists.requeue_at, exists.events) == (missing.status, missing.requeue_at, missing.events)
    assert (exists.status is None) == (age_s < BASE_GRACE_S)


def test_an_adapter_without_its_base_reports_that_and_touches_no_runtime() -> None:
    one = settled(adapter(), base())
    made = plan(ObservedAdapter(one, None, replicas=(replica(report()),)))
    assert condition(made, "Ready") == ("False", "BaseNotFound")
    assert condition(made, "Resolved") == ("True", "Resolved")
    assert made.unregisters == ()


def test_the_missing_base_of_a_new_adapter_is_reported_only_after_a_moment() -> None:
    one = adapter()
    new = ObservedAdapter(replace(one, meta=replace(one.meta, created_unix_s=NOW - 1)), None)
    assert (plan(new).status, plan(new).requeue_at) == (None, NOW + 2)
    assert condition(plan(new, NOW + 2), "Ready") == ("False", "BaseNotFound")


def test_an_adapter_that_is_not_inspected_yet_stays_registered() -> None:
    assert plan(ObservedAdapter(adapter(), base(), replicas=(replica(report()),))).unregisters == ()


def test_an_adapter_whose_files_are_invalid_is_unregistered() -> None:
    one, on = adapter(), base()
    wrong = inspected(SourceFailure(FailureReason.WRONG_BASE, "shapes"), one, on)
    made = plan(ObservedAdapter(one, on, replicas=(replica(report()),), inspection=wrong))
    assert [item.adapter.digest for item in made.unregisters] == [OLD]


def test_a_warm_adapter_is_pinned_on_its_preferred_replica_and_on_no_other() -> None:
    on = base()
    one = settled(adapter(minReplicas=1), on)
    replicas = tuple(replica(pod=f"pod-{number}") for number in range(4))
    made = plan(ObservedAdapter(one, on, replicas=replicas))
    assert len(made.registers) == 1
    assert made.registers[0].descriptor.pinned
    assert plan(ObservedAdapter(one, on, replicas=replicas[::-1])).registers[0].pod == made.registers[0].pod


def test_the_plan_of_an_idle_adapter_computes_no_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    on = base()
    one = settled(adapter(), on)
    replicas = tuple(replica(pod=f"pod-{number}") for number in range(4))
    registered = replica(report(AdapterState.REGISTERED), pod="pod-4")
    monkeypatch.setattr(observed, "placement_order", None)  # a hash for each replica, for each of thousands of plans
    assert plan(ObservedAdapter(one, on, replicas=(*replicas, registered))) == AdapterPlan()


def test_an_unchanged_descriptor_is_not_registered_twice() -> None:
    on = base()
    one = settled(adapter(minReplicas=1), on)
    observed = ObservedAdapter(one, on, replicas=(replica(report(pinned=True)),))
    first = plan(observed).registers
    assert len(first) == 1
    assert plan(replace(observed, registered={("boot", OLD): first[0].descriptor})).registers == ()


def test_usage_is_written_once_per_interval_unless_something_else_is_written() -> None:
    on = base()
    one = settled(adapter(), on)
    counted = UsagePart(boot_id="boot", requests=2, completion_tokens=50)
    used = report(usage=counted, last_used_unix_s=NOW - 2)
    made = plan(ObservedAdapter(one, on, replicas=(replica(used),)))
    assert made.status is not None
    assert made.status.usage is not None
    assert (made.status.usage.completion_tokens, made.status.last_used) == (50, "2023-11-14T22:13:18Z")
    more = report(usage=counted.model_copy(update={"completion_tokens": 70}), last_used_unix_s=NOW)
    held = ObservedAdapter(replace(one, status=made.status), on, replicas=(replica(more),))
    assert (plan(held, NOW + 30).status, plan(held, NOW + 30).requeue_at) == (None, NOW + 60)
    due = plan(held, NOW + 61).status
    assert due is not None
    assert due.usage is not None
    assert due.usage.completion_tokens == 70


def test_an_alias_belongs_to_the_older_adapter_and_the_younger_reports_it() -> None:
    on = base()
    one = settled(adapter(alias="fast"), on)
    made = plan(ObservedAdapter(one, on, name_holder=replace(one, meta=meta("older", "o")).key))
    assert condition(made, "Ready") == ("True", "Parked")
    assert condition(made, "NameConflict") == ("True", "AliasTaken")
    assert "LoraAdapter team/older" in text_of(made, "NameConflict")
    assert [(note.type, note.reason) for note in made.events] == [("Warning", "AliasTaken")]


def test_a_registration_names_the_pod_the_files_and_their_source() -> None:
    on = base()
    (made,) = plan(ObservedAdapter(settled(adapter(minReplicas=1), on), on, replicas=(replica(),))).registers
    assert (made.pod, made.pod_uid, made.adapter) == ("pod-1", "pod-1-uid", AdapterKey("a-uid", OLD))
    assert made.descriptor.display == "team/a"
    assert made.descriptor.source == SourceRef(uri="hf://org/a", revision="rev")


def test_a_replica_that_does_not_answer_is_skipped_and_loaded_ones_are_updated() -> None:
    on = base()
    silent, loaded = replica(report(), fresh=False), replica(report(), pod="pod-2")
    registered_only = replica(report(AdapterState.REGISTERED), pod="pod-3")
    made = plan(ObservedAdapter(settled(adapter(), on), on, replicas=(silent, registered_only, loaded)))
    assert [(item.pod, item.descriptor.load) for item in made.registers] == [("pod-2", False)]


def test_each_report_of_each_replica_is_decided_on_its_own() -> None:
    one, draining = adapter(suspend=True), report(AdapterState.DRAINING)
    replicas = (replica(report(), fresh=False), replica(draining, report(of=NEW), pod="pod-2"))
    made = plan(ObservedAdapter(one, base(), replicas=replicas))
    assert made.unregisters == (Unregister("pod-2-uid", "pod-2", AdapterKey("a-uid", NEW), "team/a"),)
    assert made.requeue_at == NOW + 5.0


@pytest.mark.parametrize(
    ("use", "again_at"),
    [
        ({"last_used_unix_s": NOW - 5}, None),
        ({"last_used_unix_s": NOW - 4}, NOW + 1),
        ({"last_used_unix_s": NOW - 1}, NOW + 4),
        ({"waiting": 1}, NOW + 1),
        ({"in_flight": 1}, NOW + 1),
        ({}, None),
    ],
)
def test_an_old_digest_is_unregistered_once_it_was_unused_for_a_while(
    use: dict[str, Any], again_at: float | None
) -> None:
    on = base()
    one = settled(adapter(), on, good(NEW))
    made = plan(ObservedAdapter(one, on, replicas=(replica(report(of=NEW), report(**use)),)))
    assert [item.adapter.digest for item in made.unregisters] == ([OLD] if again_at is None else [])
    assert made.requeue_at == again_at


@pytest.mark.parametrize(("age_s", "outdated"), [(9.0, True), (0.5, False)])
def test_a_runtimes_failure_from_before_a_repeated_inspection_is_cleared(age_s: float, outdated: bool) -> None:
    on = base()
    one = settled(adapter(), on)
    again = replace(one, meta=replace(one.meta, retry="1"))
    failure = ErrorDetail(reason="NonFiniteWeights", message="NaN")
    failed = report(AdapterState.FAILED, failure=failure, since_unix_s=NOW - age_s)
    observed = ObservedAdapter(again, on, replicas=(replica(failed),), inspection=inspected(good(), again, on))
    assert [item.adapter.digest for item in plan(observed).unregisters] == ([OLD] if outdated else [])
    assert plan(replace(observed, inspection=None)).unregisters == ()


def test_a_failure_causes_one_event_and_a_failed_rollout_is_named_so() -> None:
    one, on = adapter(), base()
    wrong = inspected(SourceFailure(FailureReason.WRONG_BASE, "shapes"), one, on)
    made = plan(ObservedAdapter(one, on, inspection=wrong))
    assert [(str(item.type), item.reason, item.message) for item in made.events] == [
        ("Warning", "WrongBase", f"shapes {RETRY_HINT}")
    ]
    assert made.status is not None
    changed = replace(one, status=made.status.model_copy(update={"loaded_replicas": 1}))
    assert plan(ObservedAdapter(changed, on)).status is not None
    assert plan(ObservedAdapter(changed, on)).events == ()
    served = adapter(settled(one, on).status, source={"uri": "hf://org/b"})
    bad = inspected(SourceFailure(FailureReason.INCOMPATIBLE, "lora_B is missing"), served, on)
    rollout = plan(ObservedAdapter(served, on, inspection=bad))
    assert [(item.reason, item.message) for item in rollout.events] == [
        ("RolloutFailed", f"lora_B is missing {RETRY_HINT}")
    ]


def test_a_missing_base_causes_one_event() -> None:
    one = settled(adapter(), base())
    made = plan(ObservedAdapter(one, None))
    assert [(str(item.type), item.reason) for item in made.events] == [("Warning", "BaseNotFound")]
    assert made.status is not None
    again = replace(one, status=made.status.model_copy(update={"loaded_replicas": 1}))
    assert plan(ObservedAdapter(again, None)).events == ()


def test_a_changed_bound_of_the_rank_needs_no_inspection() -> None:
    one = settled(adapter(), base(lora={"maxRank": 16}))
    lowered = plan(ObservedAdapter(one, base(lora={"maxRank": 4})))
    assert condition(lowered, "Ready") == ("False", "RankTooHigh")
    assert condition(lowered, "Resolved") == ("True", "Resolved")
    assert lowered.inspect is None
    assert lowered.status is not None
    raised = plan(ObservedAdapter(replace(one, status=lowered.status), base(lora={"maxRank": 8})))
    assert (condition(raised, "Ready"), raised.inspect) == (("True", "Parked"), None)


def test_the_rank_of_new_files_is_checked_and_shown() -> None:
    one, on = adapter(minReplicas=1), base(lora={"maxRank": 4})
    made = plan(ObservedAdapter(one, on, replicas=(replica(),), inspection=inspected(good(), one, on)))
    assert condition(made, "Ready") == ("False", "RankTooHigh")
    assert made.registers == ()
    assert made.status is not None
    assert (made.status.digest, made.status.rank) == (OLD, 8)


@pytest.mark.parametrize(
    ("reason", "served"), [("NonFiniteWeights", False), ("NoCapacity", True), ("of a later version", True)]
)
def test_a_runtimes_failure_to_load_counts_until_another_runtime_has_it_loaded(reason: str, served: bool) -> None:
    on = base()
    one = settled(adapter(minReplicas=1), on)
    failed = replica(report(AdapterState.FAILED, failure=ErrorDetail(reason=reason, message="it failed", attempts=2)))
    made = plan(ObservedAdapter(one, on, replicas=(failed,)))
    assert condition(made, "Ready") == ("False", reason)
    assert bool(made.registers) is served
    assert made.status is not None
    assert made.status.failure is not None
    assert (made.status.failure.attempts, made.status.failure.retry_at is not None) == (2, served)
    both = plan(ObservedAdapter(one, on, replicas=(failed, replica(report(), pod="pod-2"))))
    assert condition(both, "Ready") == ("True", "Loaded")


def test_the_source_with_its_revision_is_recorded_and_not_inspected_again() -> None:
    on = base()
    one = settled(adapter(source={"uri": "hf://org/a", "revision": "v1"}), on)
    assert (one.status.source_uri, one.status.source_revision, one.status.revision) == ("hf://org/a", "v1", "rev")
    assert plan(ObservedAdapter(one, on)) == AdapterPlan()


def test_an_inspection_job_has_the_whole_question() -> None:
    source = {"uri": "hf://org/a", "revision": "v1", "digest": OLD}
    one, on = adapter(source=source), base()
    job = plan(ObservedAdapter(one, on)).inspect
    assert job is not None
    assert (job.key, job.uid, job.base_uid, job.via_pod_uid) == (one.key, "a-uid", "base-uid", None)
    assert (job.uri, job.revision, job.digest, job.max_rank) == ("hf://org/a", "v1", OLD, 256)
    assert job.fingerprint == adapter_fingerprint(one, on)
    volume = adapter(source={"uri": "pvc://models/a"})
    via = plan(ObservedAdapter(volume, on, replicas=(replica(fresh=False), replica(pod="pod-2")))).inspect
    assert via is not None
    assert via.via_pod_uid == "pod-2-uid"
    assert plan(ObservedAdapter(volume, on, replicas=(replica(fresh=False),))).inspect is None


def test_a_rollout_is_tried_on_one_preferred_replica_and_each_digest_keeps_its_source() -> None:
    on = base()
    changed = adapter(settled(adapter(), on).status, source={"uri": "hf://org/b"})
    result = inspected(good(NEW), changed, on)
    pods = ("pod-1", "pod-2", "pod-3")
    observed = ObservedAdapter(
        changed, on, replicas=tuple(replica(report(), pod=pod) for pod in pods), inspection=result
    )
    made = plan(observed).registers
    sources = {(item.adapter.digest, item.descriptor.source.uri) for item in made}
    assert sources == {(OLD, "hf://org/a"), (NEW, "hf://org/b")}
    (trial,) = [item for item in made if item.adapter.digest == NEW]
    assert (trial.descriptor.load, trial.descriptor.pinned) == (True, False)
    loaded = tuple(replica(report(), *([report(of=NEW)] if pod == trial.pod else []), pod=pod) for pod in pods)
    switched = plan(replace(observed, replicas=loaded)).status
    assert switched is not None
    assert switched.digest == NEW


@pytest.mark.parametrize(
    ("reason", "after"),
    [("NonFiniteWeights", ("False", "NonFiniteWeights")), ("NoCapacity", ("True", "Parked"))],
)
def test_only_a_terminal_failure_to_load_outlasts_its_runtime(reason: str, after: tuple[str, str]) -> None:
    on = base()
    one = settled(adapter(), on)
    failure = ErrorDetail(reason=reason, message="it failed", retry_at_unix_s=NOW + 30)
    failed = plan(ObservedAdapter(one, on, replicas=(replica(report(AdapterState.FAILED, failure=failure)),))).status
    assert failed is not None
    assert failed.failure is not None
    assert failed.failure.retry_at == (None if after[0] == "False" else "2023-11-14T22:13:50Z")
    gone = plan(ObservedAdapter(replace(one, status=failed), on))
    status = gone.status or failed
    assert next((item.status, item.reason) for item in status.conditions if item.type == "Ready") == after


# --- bases that cannot serve, kstatus


def failing(reason: str, **more: Any) -> BaseObject:
    ready = {"type": "Ready", "status": "False", "reason": reason, "message": "as it is", "lastTransitionTime": "now"}
    conditions = [ready, *({**ready, "type": kind, "status": "True"} for kind in more.pop("also", ()))]
    status = {"conditions": conditions, "modules": {"modules": []}}
    return replace(base(**more), status=BaseModelStatus.model_validate(status))


@pytest.mark.parametrize(
    "reason",
    [
        "ProfileNotFound",
        "NameConflict",
        "Unavailable",
        "ImagePullFailed",
        "CrashLooping",
        "SourceNotFound",
        "Unreadable",
    ],
)
def test_an_adapter_of_a_base_that_cannot_serve_is_not_ready_and_says_why(reason: str) -> None:
    made = plan(ObservedAdapter(settled(adapter(), base()), failing(reason)))
    assert condition(made, "Ready") == ("False", "BaseNotReady")
    assert f"BaseModel team/tiny cannot serve: {reason}: as it is" in text_of(made, "Ready")
    assert "Stalled" not in types(made)
    stalled = plan(ObservedAdapter(settled(adapter(), base()), failing(reason, also=["Stalled"])))
    assert condition(stalled, "Stalled") == ("True", "BaseNotReady")


def test_a_base_that_may_recover_soon_does_not_make_its_adapters_unready() -> None:
    one, since = settled(adapter(), base()), "2023-11-14T22:13:20Z"
    crashed = failing("CrashLooping")
    conditions = [item.model_copy(update={"last_transition_time": since}) for item in crashed.status.conditions]
    crashed = replace(crashed, status=crashed.status.model_copy(update={"conditions": conditions}))
    early = plan(ObservedAdapter(one, crashed), NOW + 29)
    assert (early.status, early.requeue_at) == (None, NOW + 30)
    assert condition(plan(ObservedAdapter(one, crashed), NOW + 30), "Ready") == ("False", "BaseNotReady")


@pytest.mark.parametrize("reason", ["Starting"])
def test_an_adapter_of_a_base_that_starts_stays_ready(reason: str) -> None:
    one = settled(adapter(), base())
    assert plan(ObservedAdapter(one, failing(reason))) == AdapterPlan()


def test_an_adapter_of_a_base_that_cannot_be_parsed_does_not_say_that_the_base_is_missing() -> None:
    made = plan(ObservedAdapter(settled(adapter(), base()), None, base_unreadable=True))
    assert condition(made, "Ready") == ("False", "BaseNotReady")


def test_an_adapter_on_a_volume_of_a_sleeping_base_is_ready_but_unverified() -> None:
    one = adapter(source={"uri": "pvc://models/a"})
    made = plan(ObservedAdapter(one, base(replicas=0)))
    assert condition(made, "Ready") == ("True", "Unverified")
    assert condition(made, "Resolved") == ("Unknown", "AwaitingRuntime")
    assert types(made) & {"Reconciling", "Stalled"} == set()
    assert condition(plan(ObservedAdapter(one, failing("CrashLooping"))), "Ready") == ("False", "BaseNotReady")


def test_a_terminal_failure_is_stalled_and_says_what_makes_the_operator_check_again() -> None:
    one, on = adapter(), base()
    failure = SourceFailure(FailureReason.INVALID_SOURCE, "a pickle; save it again")
    made = plan(ObservedAdapter(one, on, inspection=inspected(failure, one, on)))
    assert condition(made, "Stalled") == ("True", "InvalidSource")
    assert text_of(made, "Ready").startswith("a pickle; save it again")
    assert "lorapool.dev/retry" in text_of(made, "Ready")
    longest = SourceFailure(FailureReason.INVALID_SOURCE, "x" * 2000)
    cut = plan(ObservedAdapter(one, on, inspection=inspected(longest, one, on)))
    assert text_of(cut, "Ready").endswith("lorapool.dev/retry changes.")


def test_a_namespace_that_is_not_permitted_is_stalled_and_a_missing_base_is_not() -> None:
    one = adapter(baseModelRef={"name": "tiny", "namespace": "team"})
    one = replace(one, meta=meta("a", "a-uid", namespace="guest"))
    refused = plan(ObservedAdapter(one, base()))
    assert condition(refused, "Stalled") == ("True", "NotPermitted")
    assert "Stalled" not in types(plan(ObservedAdapter(adapter(), None)))


@pytest.mark.parametrize("reason", [FailureReason.SOURCE_NOT_FOUND, FailureReason.UNAUTHORIZED])
def test_a_source_that_may_still_be_uploaded_or_shared_is_inspected_again_within_ten_minutes(
    reason: FailureReason,
) -> None:
    one, on = adapter(), base()
    missing, now, waits = SourceFailure(reason, "it is not there"), NOW, []
    for attempt in range(1, 10):
        result = replace(inspected(missing, one, on, attempt), at_unix_s=now, jitter=1.0)
        made = plan(ObservedAdapter(one, on, inspection=result), now)
        assert condition(made, "Ready") == ("False", reason.value)
        assert "Stalled" not in types(made)
        assert made.requeue_at is not None
        assert made.status is not None
        waits.append(round(made.requeue_at - now))
        one, now = replace(one, status=made.status), made.requeue_at
        assert plan(ObservedAdapter(one, on, inspection=result), now).inspect is not None
    assert waits[0] <= 6
    assert 595 <= waits[-1] <= 601


def test_a_source_that_refused_access_is_inspected_at_once_when_the_credentials_change() -> None:
    one, on = adapter(), base()
    refused = replace(inspected(SourceFailure(FailureReason.UNAUTHORIZED, "x" * 2000), one, on), began_unix_s=NOW - 2)
    status = plan(ObservedAdapter(one, on, inspection=refused)).status
    assert status is not None
    failed = ObservedAdapter(replace(one, status=status), on, inspection=refused)
    assert plan(failed).inspect is None
    assert plan(replace(failed, credentials_unix_s=NOW - 3)).inspect is None
    job = plan(replace(failed, credentials_unix_s=NOW)).inspect
    assert job is not None
    assert job.attempt == 2
    assert plan(replace(failed, inspection=None, credentials_unix_s=NOW)).inspect is not None
    assert status.failure is not None
    assert "mounted credentials" in status.failure.message
    assert "lorapool.dev/retry" in status.failure.message
    missing = inspected(SourceFailure(FailureReason.SOURCE_NOT_FOUND, "404"), one, on)
    waits = plan(ObservedAdapter(one, on, inspection=missing)).status
    assert waits is not None
    unmoved = ObservedAdapter(replace(one, status=waits), on, inspection=missing, credentials_unix_s=NOW)
    assert plan(unmoved).inspect is None


@pytest.mark.parametrize("reason", ["SourceNotFound", "Unauthorized"])
def test_files_that_a_runtime_could_not_get_are_asked_for_again_by_a_later_request(reason: str) -> None:
    one, on = settled(adapter(), base()), base()
    detail = ErrorDetail(reason=reason, message="404")
    missing = report(AdapterState.FAILED, failure=detail, since_unix_s=NOW)
    made = plan(ObservedAdapter(one, on, replicas=(replica(missing),)), NOW + 59)
    assert condition(made, "Ready") == ("False", reason)
    assert made.unregisters == ()
    after = plan(ObservedAdapter(one, on, replicas=(replica(missing),)), NOW + 60)
    assert [item.adapter.digest for item in after.unregisters] == [OLD]
    assert made.status is not None
    idle = plan(ObservedAdapter(replace(one, status=made.status), on, replicas=(replica(),)), NOW + 61)
    assert condition(idle, "Ready") == ("True", "Parked")


def test_a_changed_source_that_cannot_be_read_yet_is_said_while_the_old_files_serve() -> None:
    on = base()
    one = settled(adapter(), on)
    edited = replace(one, spec=adapter(source={"uri": "hf://org/later"}).spec)
    missing = SourceFailure(FailureReason.SOURCE_NOT_FOUND, "404; upload it")
    made = plan(ObservedAdapter(edited, on, inspection=inspected(missing, edited, on)))
    assert condition(made, "Ready") == ("True", "Parked")
    assert condition(made, "Progressing") == ("True", "SourceNotFound")
    assert condition(made, "Reconciling") == ("True", "SourceNotFound")
    assert "404; upload it" in text_of(made, "Progressing")


def test_a_failed_rollout_is_stalled() -> None:
    on = base()
    one = settled(adapter(), on)
    edited = replace(one, spec=adapter(source={"uri": "hf://org/wrong"}).spec)
    wrong = SourceFailure(FailureReason.WRONG_BASE, "8x8; train again")
    made = plan(ObservedAdapter(edited, on, inspection=inspected(wrong, edited, on)))
    assert condition(made, "Ready") == ("True", "Parked")
    assert condition(made, "Stalled") == ("True", "RolloutFailed")


def test_more_pinned_replicas_than_the_base_may_have_are_said() -> None:
    on = base(scaling={"maxReplicas": 1})
    one = adapter(minReplicas=3)
    made = plan(ObservedAdapter(one, on, inspection=inspected(good(), one, on)))
    assert "minReplicas is 3, but the base has at most 1 replicas" in text_of(made, "Ready")


# --- sources whose files change


def check_of(of: AdapterObject, on: BaseObject, facts: SourceFacts, at: float) -> InspectionResult:
    return InspectionResult(f"{adapter_fingerprint(of, on)}#check", 1, facts, at, 0.5)


def due_check(observed: ObservedAdapter, now: float) -> float:
    """When the next look at the source is due."""
    due = plan(observed, now).requeue_at
    assert due is not None
    return due


def test_a_source_that_can_change_is_looked_at_once_an_hour_and_not_at_once_after_a_restart() -> None:
    on = base()
    observed = ObservedAdapter(settled(adapter(), on), on, since_unix_s=NOW)
    due = due_check(observed, NOW)
    assert NOW < due <= NOW + 3600
    assert plan(observed, due - 1).inspect is None
    job = plan(observed, due).inspect
    assert job is not None
    assert (job.fingerprint, job.digest) == (f"{adapter_fingerprint(observed.adapter, on)}#check", None)
    checked = replace(observed, inspection=check_of(observed.adapter, on, good(), due + 1))
    assert plan(checked, due + 3599).inspect is None
    assert plan(checked, due + 3600).inspect is not None


def test_a_source_is_not_looked_at_again_for_a_moment_before_its_first_inspection() -> None:
    on = base()
    observed = ObservedAdapter(settled(adapter(), on), on, since_unix_s=NOW - 90_000)
    due = due_check(observed, NOW)
    first = replace(inspected(good(), observed.adapter, on), at_unix_s=due + 1)
    assert plan(replace(observed, inspection=first), due + 2).inspect is None
    assert plan(replace(observed, inspection=first), due + 3600).inspect is not None


@pytest.mark.parametrize(
    "source",
    [
        {"uri": "hf://org/a", "revision": "0123456789abcdef0123456789abcdef01234567"},
        {"uri": f"oci://registry/a@{OLD}"},
        {"uri": "oci://registry/a", "revision": OLD},
        {"uri": "pvc://models/a"},
    ],
)
def test_a_source_that_cannot_change_or_be_read_now_is_not_looked_at_again(source: dict[str, str]) -> None:
    on = base(replicas=0)
    observed = ObservedAdapter(settled(adapter(source=source), on), on, since_unix_s=NOW - 90_000)
    assert plan(observed) == AdapterPlan()


def test_newer_files_at_a_pinned_source_are_reported_and_not_served() -> None:
    on = base()
    one = settled(adapter(), on)
    newer = SourceFacts(NEW, "rev-2", 8, ("q_proj",), 100)
    observed = ObservedAdapter(one, on, inspection=check_of(one, on, newer, NOW), since_unix_s=NOW - 1)
    made = plan(observed)
    assert condition(made, "Outdated") == ("True", "SourceChanged")
    assert NEW in text_of(made, "Outdated")
    assert "updatePolicy" in text_of(made, "Outdated")
    assert condition(made, "Ready") == ("True", "Parked")
    assert made.status is not None
    assert made.status.digest == OLD
    assert [(note.type, note.reason) for note in made.events] == [("Warning", "SourceChanged")]
    restarted = replace(observed, adapter=replace(one, status=made.status), inspection=None)
    assert plan(restarted).status is None
    back = plan(replace(observed, adapter=replace(one, status=made.status), inspection=check_of(one, on, good(), NOW)))
    assert "Outdated" not in types(back)


def test_files_for_chats_that_a_recorded_digest_leaves_out_are_not_called_newer_weights() -> None:
    on = base()
    one = settled(adapter(), on)
    whole = SourceFacts(NEW, "rev", 8, ("q_proj",), 100, weights_digest=OLD)
    made = plan(ObservedAdapter(one, on, inspection=check_of(one, on, whole, NOW), since_unix_s=NOW - 1))
    assert condition(made, "Outdated") == ("True", "SourceChanged")
    assert "The weights are the same" in text_of(made, "Outdated")
    assert "change the annotation lorapool.dev/retry" in text_of(made, "Outdated")


def test_newer_files_at_a_polled_source_are_rolled_out() -> None:
    on = base()
    one = settled(adapter(source={"uri": "hf://org/a", "updatePolicy": "Poll"}), on)
    observed = ObservedAdapter(one, on, replicas=(replica(),), since_unix_s=NOW)
    assert due_check(observed, NOW) <= NOW + 300
    checked = replace(observed, inspection=check_of(one, on, SourceFacts(NEW, "rev-2", 8), NOW))
    made = plan(checked)
    assert [(item.adapter.digest, item.descriptor.load) for item in made.registers] == [(NEW, True)]
    assert condition(made, "Progressing") == ("True", "Loading")
    assert "Outdated" not in types(made)
    loaded = replica(report(of=NEW))
    switched = plan(replace(checked, adapter=replace(one, status=made.status), replicas=(loaded,)))  # type: ignore[arg-type]
    assert switched.status is not None
    assert (switched.status.digest, switched.status.revision) == (NEW, "rev-2")
    again = replace(checked, adapter=replace(one, status=switched.status), replicas=(loaded,))
    assert plan(again).status is None


def test_newer_files_that_do_not_fit_are_a_failed_rollout() -> None:
    on = base()
    one = settled(adapter(source={"uri": "hf://org/a", "updatePolicy": "Poll"}), on)
    checked = ObservedAdapter(
        one, on, inspection=check_of(one, on, SourceFacts(NEW, "rev-2", 99), NOW), since_unix_s=NOW
    )
    made = plan(checked)
    assert condition(made, "Progressing") == ("False", "RolloutFailed")
    assert condition(made, "Ready") == ("True", "Parked")


def three_replicas(*reports: AdapterReport, **more: Any) -> ObservedAdapter:
    """A settled adapter on three replicas; its reports come from its most preferred ones."""
    one, on = adapter(**more.pop("spec", {})), base(scaling={"maxReplicas": 3, "targetInFlight": 10})
    one = settled(one, on)
    names = [f"pod-{number}" for number in range(3)]
    order = placement_order("a-uid", [Replica(f"{name}-uid") for name in names])
    preferred = sorted(names, key=lambda name: order.index(f"{name}-uid"))
    known = zip(preferred, [*((item,) for item in reports), (), (), ()], strict=False)
    return ObservedAdapter(one, on, replicas=tuple(replica(*items, pod=pod) for pod, items in known), **more)


def test_a_hot_adapter_spreads_and_is_loaded_on_its_new_preferred_replicas() -> None:
    observed = three_replicas(report(in_flight=18, waiting=4))
    first = plan(observed)
    assert first.requeue_at == NOW + 3
    assert first.status is not None
    assert first.status.placement is None
    made = plan(replace(observed, spread_memory=first.memory), NOW + 3)
    assert made.status is not None
    assert made.status.placement is not None
    pods = [item.runtime.pod for item in observed.replicas]
    assert (made.status.placement.k, made.status.placement.replicas) == (3, pods)
    assert "22 requests" in made.status.placement.why
    assert [(item.pod, item.descriptor.load, item.descriptor.pinned) for item in made.registers] == [
        (pod, True, False) for pod in pods
    ]


def test_a_hot_adapter_spreads_no_further_than_its_own_and_the_bases_default_bound() -> None:
    hot = SpreadMemory(high_since_unix_s=NOW - 9)
    busy = report(in_flight=90)
    for spec, defaults, k in (({}, {}, 3), ({"maxReplicas": 2}, {}, 2), ({}, {"maxReplicas": 1}, 1)):
        observed = three_replicas(busy, spec=spec, spread_memory=hot)
        assert observed.base is not None
        owner = observed.base.spec.model_copy(update={"adapter_defaults": AdapterDefaults.model_validate(defaults)})
        status = plan(replace(observed, base=replace(observed.base, spec=owner))).status
        published = status.placement.k if status is not None and status.placement is not None else 1
        assert published == k


def test_a_cold_adapter_publishes_no_placement() -> None:
    status = plan(three_replicas(report(in_flight=1))).status
    assert status is not None
    assert status.placement is None


def test_a_placement_is_kept_while_a_replica_has_not_answered_yet() -> None:
    observed = three_replicas(report(in_flight=30), report())
    hot = LoraAdapterStatus.model_copy(
        observed.adapter.status, update={"placement": PlacementStatus(k=2, replicas=["x", "y"], why="load")}
    )
    unknown = tuple(
        replace(item, runtime=replace(item.runtime, snapshot=None, fresh=False), reports=())
        for item in observed.replicas
    )
    restarted = replace(observed, adapter=replace(observed.adapter, status=hot), replicas=unknown)
    after = plan(restarted).status
    assert after is None or after.placement == hot.placement


def test_an_adapter_that_a_hot_replica_unloaded_is_loaded_there_again() -> None:
    observed = three_replicas(report(in_flight=30), report(AdapterState.REGISTERED), report(in_flight=9))
    hot = observed.adapter.status.model_copy(update={"placement": PlacementStatus(k=3)})
    observed = replace(observed, adapter=replace(observed.adapter, status=hot))
    known = {("boot", OLD): plan(observed).registers[0].descriptor}
    [again] = plan(replace(observed, registered=known)).registers
    assert again.pod == observed.replicas[1].runtime.pod


def test_a_pin_beyond_what_the_owner_allows_is_not_made_and_the_status_says_so() -> None:
    observed = three_replicas(spec={"minReplicas": 2})
    first = observed.replicas[0].runtime
    made = plan(replace(observed, allowed_pins=frozenset({first.pod_uid})))
    assert [(item.pod, item.descriptor.pinned) for item in made.registers] == [(first.pod, True)]
    assert made.status is not None
    assert made.status.placement is not None
    assert made.status.placement.k == 1
    refused = plan(replace(observed, allowed_pins=frozenset()))
    assert refused.registers == ()
    assert condition(refused, "Loaded") == ("False", "PinRefused")
    assert condition(refused, "Ready")[0] == "True"


def test_a_guests_pin_that_does_not_keep_the_base_running_says_so() -> None:
    on = base(access={"namespaces": ["guest"]}, replicas=0)
    one = adapter(minReplicas=1, baseModelRef={"name": "tiny", "namespace": "team"})
    one = settled(replace(one, meta=meta("a", "a-uid", namespace="guest")), on)
    assert {item.type: item.reason for item in one.status.conditions}["Loaded"] == "PinRefused"
    assert "spec.access.guests" in {item.type: item.message for item in one.status.conditions}["Ready"]
    kept = base(access={"namespaces": ["guest"], "guests": {"keepAwake": True}}, replicas=0)
    assert settled(one, kept).status.state == "Parked"
