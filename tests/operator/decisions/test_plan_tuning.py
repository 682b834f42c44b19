"""What the operator does about the FineTuneJobs of a base: admission, turns, the trainer's Job, results, ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from base_world import NOW, meta
from tuning_plans import (
    LIMITS,
    VALID,
    adapter,
    after,
    condition,
    job,
    observed,
    only,
    plan,
    report,
    session,
    trained,
    trainer,
    trainer_pod,
    tuned,
)

from lorapool_api.base_modules import BaseModule, compact
from lorapool_api.basemodel import BaseModelStatus
from lorapool_api.settings import read
from lorapool_api.tuning.finetunejob import FINALIZER
from lorapool_api.tuning.states import JobFailure, JobState
from lorapool_operator.decisions.tuning.turns import counted_before
from lorapool_operator.decisions.tuning.values import TuningLimits
from lorapool_operator.world.profiles import RuntimeProfile
from lorapool_operator.world.tuning import DataFinding, ObservedJob, Sent
from lorapool_trainer.serve.settings import TrainerSettings

MODULES = compact([BaseModule("model.layers.0.self_attn.q_proj", 8, 8), BaseModule("model.layers.0.mlp.up_proj", 8, 8)])


# --- before any pod ----------------------------------------------------------------------


def test_a_new_job_gets_its_finalizer_and_a_check_of_its_data_and_no_pod() -> None:
    new = ObservedJob(replace(job(), finalizers=()))
    found = plan(new)
    assert found.start == ()
    assert (only(found).finalizers, only(found).check_data) == ((FINALIZER,), True)
    assert only(found).status is not None
    assert only(found).status.state == JobState.VALIDATING


@pytest.mark.parametrize(
    ("world", "spec", "reason"),
    [
        ({"base": None}, {}, "BaseNotFound"),
        ({"base": tuned(fineTuning={"enabled": False})}, {}, "TuningDisabled"),
        ({"profile": None}, {}, "ProfileNotUsable"),
        ({"store": False}, {}, "NoStore"),
    ],
)
def test_a_job_whose_base_cannot_tune_waits_and_starts_no_pod(
    world: dict[str, Any], spec: dict[str, Any], reason: str
) -> None:
    found = plan(observed(**spec), **world)
    assert found.start == ()
    assert condition(only(found), "Admitted") == ("False", reason)
    assert only(found).status is not None
    assert only(found).status.state == JobState.QUEUED


def test_a_guest_reads_the_same_of_a_base_that_does_not_exist_and_of_one_that_does_not_list_it() -> None:
    guest = observed(baseModelRef={"name": "tiny", "namespace": "other"})
    owner = replace(tuned(), meta=meta("tiny", "base-uid", namespace="other"))
    texts = set()
    for base in (None, owner):
        found = only(plan(guest, base=base))
        assert condition(found, "Admitted") == ("False", "NotPermitted")
        assert found.status is not None
        texts.add(next(item.message for item in found.status.conditions if item.type == "Admitted"))
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("spec", "finding", "reason", "named"),
    [
        ({"lora": {"rank": 32}}, VALID, "Incompatible", "Rank 32 is above 16"),
        (
            {"lora": {"targetModules": ["q_proj", "nope"]}},
            VALID,
            "Incompatible",
            "no module nope (lora.targetModules). It has q_proj, up_proj.",
        ),
        ({"training": {"maxTokens": 4096}}, VALID, "Incompatible", "maxTokens 4096 is above 2048"),
        ({"initFrom": {"name": "gone"}}, VALID, "Incompatible", "gone"),
        (
            {"data": {"training": {"uri": "store://other/files/x"}, "validationFraction": "0.1"}},
            VALID,
            "InvalidDataset",
            "does not exist in namespace team",
        ),
        (
            {},
            DataFinding(failure=JobFailure.TOO_FEW_EXAMPLES, message="9 examples; at least 10 are needed"),
            "TooFewExamples",
            "9 examples",
        ),
        (
            {},
            DataFinding(failure=JobFailure.INVALID_DATASET, message="Line 3 is not JSON", line=3),
            "InvalidDataset",
            "Line 3",
        ),
    ],
)
def test_a_job_that_can_never_train_fails_before_any_pod(
    spec: dict[str, Any], finding: DataFinding, reason: str, named: str
) -> None:
    found = plan(observed(finding=finding, **spec), base=tuned_with_modules())
    assert found.start == ()
    status = only(found).status
    assert status is not None
    assert status.failure is not None
    assert (status.state, status.failure.reason, status.failure.line) == (JobState.FAILED, reason, finding.line)
    assert named in status.failure.message
    assert condition(only(found), "Completed") == ("True", reason)
    assert [event.reason for event in only(found).events] == [reason]


def tuned_with_modules() -> Any:
    return replace(tuned(), status=BaseModelStatus(modules=MODULES))


def test_names_of_modules_are_compared_as_peft_compares_them() -> None:
    names = ["q_proj", "self_attn.q_proj", "model.layers.0.mlp.up_proj", "all-linear"]
    found = plan(observed(lora={"targetModules": names}), base=tuned_with_modules())
    assert found.start


def test_a_store_that_cannot_be_reached_is_asked_again_later() -> None:
    away = DataFinding(failure=JobFailure.SOURCE_UNAVAILABLE, message="503", at_unix_s=NOW)
    found = only(plan(observed(finding=away)))
    assert found.status is not None
    assert found.status.failure is not None
    assert (found.status.state, found.check_data, found.status.failure.attempts) == (JobState.VALIDATING, False, 1)
    later = plan(after(found), now=NOW + LIMITS.retry_s)
    assert only(later).check_data


def test_one_job_too_many_of_a_namespace_is_refused_and_an_accepted_one_stays() -> None:
    limits = TuningLimits(unfinished_jobs=2)
    found = plan(observed(), limits=limits, older_unfinished={"j-uid": 2})
    assert condition(only(found), "Completed") == ("True", "QuotaExceeded")
    accepted = observed(status={"state": "Queued"})
    assert plan(accepted, limits=limits, older_unfinished={"j-uid": 2}).start


def test_an_accepted_job_counts_before_a_new_one_of_the_same_second_whatever_the_uids_are() -> None:
    accepted, new, later = job("b", status={"state": "Queued"}), job("a"), job("0", created=1.0)
    unfinished = [accepted, new, later]
    assert [counted_before(one, unfinished) for one in (new, later)] == [1, 2]


# --- turns -------------------------------------------------------------------------------


def test_priority_comes_before_age_and_a_job_that_trains_is_not_displaced() -> None:
    old, new, urgent = observed("a"), observed("b", created=1.0), observed("c", created=2.0, priority=90)
    base = tuned(fineTuning={"enabled": True, "maxJobs": 1})
    found = plan(old, new, urgent, base=base, session=session(), trainer=trainer())
    assert [item.put is not None for item in found.jobs] == [False, False, True]
    waits = [item.status.queue for item in found.jobs if item.status is not None]
    assert [(item.position, item.reason) for item in waits if item is not None][:2] == [
        (1, "WaitingForTurn"),
        (2, "WaitingForTurn"),
    ]
    running = plan(old, new, urgent, base=base, session=session(), trainer=trainer(report("a")))
    assert [item.put is not None for item in running.jobs] == [True, False, False]  # sent again by a new operator


def test_a_namespace_that_trains_as_much_as_it_may_waits() -> None:
    found = plan(observed(), limits=TuningLimits(active_jobs=2), active_elsewhere={"team": 2})
    assert found.start == ()
    assert condition(only(found), "Admitted") == ("False", "NamespaceLimit")


def test_a_paused_job_takes_no_place_and_starts_no_pod() -> None:
    found = plan(observed(run="Paused"))
    assert found.start == ()
    assert only(found).status is not None
    assert only(found).status.state == JobState.PAUSED


# --- the trainer's Job -------------------------------------------------------------------


def test_a_queued_job_starts_one_trainer_and_a_second_plan_does_not() -> None:
    found = plan(observed("a"), observed("b"))
    assert [(item["kind"], item["metadata"]["name"]) for item in found.start] == [("Job", "tiny-trainer")]
    assert plan(observed("a"), observed("b"), session=session()).start == ()


def test_the_trainers_pod_is_below_serving_and_no_selector_of_runtimes_matches_it() -> None:
    profile = RuntimeProfile.model_validate(
        {
            "priorityClassName": "serving",
            "env": [{"name": "LORAPOOL_RUNTIME_SLOTS", "value": "4"}, {"name": "HF_TOKEN", "value": "t"}],
            "trainer": {"suspend": True, "jobLabels": {"kueue.x-k8s.io/queue-name": "gpu"}},
            "networkPolicy": {"egress": []},
        }
    )
    policy, made = plan(observed(), profile=profile, limits=TuningLimits(priority_class="tuning")).start
    pod = made["spec"]["template"]["spec"]
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert (made["spec"]["suspend"], made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]) == (True, "gpu")
    assert (pod["priorityClassName"], pod["restartPolicy"]) == ("tuning", "OnFailure")
    assert made["spec"]["podReplacementPolicy"] == "Failed"  # never two that write the same checkpoints
    assert "lorapool.dev/base-uid" not in labels
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    container = pod["containers"][0]
    assert container["command"] == ["python", "-m", "lorapool_trainer", "serve"]
    env = {item["name"]: item.get("value") for item in container["env"]}
    assert (env["LORAPOOL_TRAINER_MODEL"], env["LORAPOOL_TRAINER_MAX_JOBS"], env["HF_TOKEN"]) == (
        "hf://org/base",
        "8",
        "t",
    )
    assert [name for name in env if name.startswith("LORAPOOL_RUNTIME_")] == []
    assert env["LORAPOOL_TRAINER_IDLE_AFTER_S"] == "120"


def test_with_tls_the_trainer_serves_the_certificate_of_its_base() -> None:
    (made,) = plan(observed(), tls=True).start
    container = made["spec"]["template"]["spec"]["containers"][0]
    assert "LORAPOOL_TRAINER_TLS_DIR" in {item["name"] for item in container["env"]}
    assert container["ports"][0]["name"] == "https"


def test_a_suspended_session_leaves_its_jobs_in_the_queue() -> None:
    found = plan(observed(), session=session(suspended=True))
    assert condition(only(found), "Admitted") == ("False", "AwaitingRelease")
    assert found.stop_uid is None


def test_an_idle_trainer_is_ended_once_idle_after_has_passed() -> None:
    idle = trainer(idle_since_unix_s=NOW)
    assert plan(session=session(), trainer=idle, now=NOW + 119).stop_uid is None
    assert plan(session=session(), trainer=idle, now=NOW + 119).requeue_at == NOW + 120
    assert plan(session=session(), trainer=idle, now=NOW + 120).stop_uid == "session-uid"
    assert plan(observed(), session=session(), trainer=idle, now=NOW + 120).stop_uid is None


def test_a_session_that_ended_is_replaced_when_a_job_waits_and_a_failed_one_after_a_while() -> None:
    assert plan(session=session(complete=True)).stop_uid is None
    assert plan(observed(), session=session(complete=True)).stop_uid == "session-uid"
    failed = session(failure="BackoffLimitExceeded: x", ended_unix_s=NOW)
    assert plan(observed(), session=failed, now=NOW + 59).stop_uid is None
    assert plan(observed(), session=failed, now=NOW + 60).stop_uid == "session-uid"


def test_the_session_of_a_deleted_base_of_the_same_name_is_ended() -> None:
    assert plan(observed(), session=session(owner_uid="old-uid")).stop_uid == "session-uid"


def test_a_pod_that_no_node_has_room_for_is_reported_with_the_schedulers_words() -> None:
    pod = trainer_pod(ready=False, problem="Unschedulable: 0/3 nodes have a free gpu")
    found = only(plan(observed(), session=session(), trainer=replace(trainer(pod=pod), snapshot=None)))
    assert found.status is not None
    assert found.status.failure is not None
    assert (found.status.failure.reason, found.status.state) == ("NoCapacity", JobState.QUEUED)
    assert "free gpu" in found.status.failure.message


# --- training ----------------------------------------------------------------------------


def test_a_trainer_is_sent_numbers_and_the_digest_of_the_checked_file() -> None:
    first = only(plan(observed(), session=session(), trainer=trainer()))
    sent = first.put
    assert sent is not None
    assert (sent.lora.rank, sent.lora.alpha, sent.training.epochs, sent.training.learning_rate) == (8, 16, 3, "1e-4")
    assert (sent.workspace, sent.output) == ("store://team/jobs/j-uid", "store://team/adapters/j-uid")
    assert sent.data.training.digest == VALID.digest
    again = only(plan(after(first), session=session(), trainer=trainer()))
    assert again.put == sent  # also once the status has the digest


def test_a_job_is_sent_once_to_each_process_and_again_when_its_owner_changes_it() -> None:
    known = observed(status={"state": "Training"})
    first = only(plan(known, session=session(), trainer=trainer())).put
    assert first is not None
    has = replace(known, sent=Sent("boot", first, NOW))
    assert only(plan(has, session=session(), trainer=trainer(report()))).put is None
    paused = replace(has, job=replace(has.job, spec=has.job.spec.model_copy(update={"run": "Paused"})))
    assert only(plan(paused, session=session(), trainer=trainer(report()))).put is not None
    assert only(plan(has, session=session(), trainer=trainer(report(), boot_id="other"))).put is not None
    old = only(plan(has, session=session(), trainer=trainer(report()), now=NOW + 6 * 3600))
    assert old.put is not None  # with new access to the store


def test_a_job_that_its_trainer_has_trained_is_not_sent_again() -> None:
    assert only(plan(observed(), session=session(), trainer=trainer(trained()))).put is None


def test_progress_is_written_every_ten_seconds_and_a_new_state_at_once() -> None:
    first = only(plan(observed(), session=session(), trainer=trainer(report())))
    assert first.status is not None
    assert first.status.state == JobState.TRAINING
    stepped = trainer(report(progress={"step": 3, "totalSteps": 30}))
    known = after(first, written_unix_s=NOW)
    waits = only(plan(known, session=session(), trainer=stepped, now=NOW + 4))
    assert (waits.status, waits.requeue_at) == (None, NOW + 10)
    due = only(plan(known, session=session(), trainer=stepped, now=NOW + 10))
    assert due.status is not None
    assert due.status.progress is not None
    assert (due.status.progress.steps, due.status.progress.percent) == ("3/30", 10)
    evaluating = trainer(report(state=JobState.EVALUATING))
    assert only(plan(known, session=session(), trainer=evaluating, now=NOW + 4)).status is not None


def test_a_trainer_that_is_silent_for_a_moment_changes_nothing() -> None:
    first = only(plan(observed(), session=session(), trainer=trainer(report())))
    quiet = only(plan(after(first), session=session(), trainer=trainer(report(), fresh=False)))
    assert (quiet.status, quiet.put, quiet.events) == (None, None, ())


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (trainer_pod(ready=False, last_exit="exit code 137"), "TrainerLost"),
        (trainer_pod(ready=False, disruption="PreemptionByScheduler"), "Preempted"),
    ],
)
def test_a_lost_trainer_puts_its_jobs_back_in_the_queue_with_the_reason(pod: Any, reason: str) -> None:
    first = only(plan(observed(), session=session(), trainer=trainer(report(progress={"step": 5, "totalSteps": 9}))))
    lost = only(plan(after(first), session=session(), trainer=trainer(report(), fresh=False, pod=pod)))
    assert lost.status is not None
    assert lost.status.failure is not None
    assert (lost.status.state, lost.status.failure.reason) == (JobState.QUEUED, reason)
    assert lost.status.progress is not None
    assert lost.status.progress.step == 5  # what was last reported stays
    gone = only(plan(after(lost), session=session()))  # its pod is gone altogether
    assert gone.status is None or gone.status.failure is not None
    back = only(plan(after(lost), session=session(), trainer=trainer(report(), boot_id="two")))
    assert back.status is not None
    assert (back.status.state, back.status.failure) == (JobState.TRAINING, None)


def test_a_job_over_its_deadline_fails_and_is_taken_from_the_trainer() -> None:
    first = only(plan(observed(activeDeadline="1h"), session=session(), trainer=trainer(report())))
    assert first.requeue_at == NOW + 3600
    late = only(plan(after(first), session=session(), trainer=trainer(report()), now=NOW + 3600))
    assert late.unregister
    assert condition(late, "Completed") == ("True", "DeadlineExceeded")


def test_a_cancelled_job_is_taken_from_the_trainer_and_stays_cancelled() -> None:
    found = only(plan(observed(run="Cancelled"), session=session(), trainer=trainer(report())))
    assert found.unregister
    assert condition(found, "Completed") == ("True", "Cancelled")
    done = only(plan(after(found), session=session(), trainer=trainer()))
    assert (done.status, done.put, done.unregister) == (None, None, False)


def test_the_trainers_own_failure_ends_the_job_with_its_line() -> None:
    broken = report(state=JobState.FAILED, failure={"reason": "ExampleTooLong", "message": "too long", "line": 7})
    found = only(plan(observed(), session=session(), trainer=trainer(broken)))
    assert found.status is not None
    assert found.status.failure is not None
    assert (found.status.state, found.status.failure.line, found.unregister) == (JobState.FAILED, 7, True)
    assert condition(found, "DataValid") == ("False", "ExampleTooLong")


# --- results -----------------------------------------------------------------------------


def test_a_better_result_becomes_a_lora_adapter_and_the_job_ends_once_it_has_its_name() -> None:
    first = only(plan(observed(output={"suffix": "routing"}), session=session(), trainer=trainer(trained())))
    made = first.promote
    assert made is not None
    assert first.status is not None
    assert first.status.state == JobState.PUBLISHING
    assert made["spec"]["source"] == {"uri": "store://team/adapters/j-uid", "digest": trained().result.digest}  # type: ignore[union-attr]
    assert made["spec"]["alias"] == "ft:tiny:team:routing:j"
    assert "ownerReferences" not in made["metadata"]
    assert made["metadata"]["annotations"]["lorapool.dev/tuned-by"] == "team/j@j-uid"
    exists = only(plan(after(first, result=adapter()), session=session(), trainer=trainer(trained())))
    assert exists.promote is None
    named = adapter(status={"alias": "ft:tiny:team::j"})
    done = only(plan(after(first, result=named), session=session(), trainer=trainer(trained())))
    assert done.status is not None
    assert done.status.result is not None
    assert (done.status.state, done.status.result.model, done.unregister) == (
        JobState.SUCCEEDED,
        "ft:tiny:team:routing:j",
        True,
    )
    assert condition(done, "Promoted") == ("True", "Promoted")


@pytest.mark.parametrize(
    ("promotion", "valid", "named"),
    [
        ({}, 2.0, "not lower by more than 0"),
        ({"minImprovement": "0.5"}, 1.6, "not lower by more than 0.5"),
        ({"maxValidLoss": "0.9"}, 1.0, "above 0.9"),
        ({}, None, "Nothing was measured"),
    ],
)
def test_a_result_that_does_not_pass_the_gate_makes_no_model(
    promotion: dict[str, Any], valid: float | None, named: str
) -> None:
    found = only(plan(observed(promotion=promotion), session=session(), trainer=trainer(trained(valid=valid))))
    assert found.promote is None
    assert found.status is not None
    assert found.status.failure is not None
    assert named in found.status.failure.message
    assert (found.status.state, found.status.failure.reason) == (JobState.FAILED, "GateNotMet")
    assert found.status.result is not None
    assert (found.status.result.model, found.status.result.digest) == (None, trained().result.digest)  # type: ignore[union-attr]


@pytest.mark.parametrize(("policy", "promoted"), [("Always", True), ("Never", False)])
def test_without_a_gate_the_policy_alone_decides(policy: str, promoted: bool) -> None:
    worse = trainer(trained(valid=9.0))
    found = only(plan(observed(promotion={"policy": policy}), session=session(), trainer=worse))
    assert found.status is not None
    assert (found.promote is not None) == promoted
    assert found.status.state == (JobState.PUBLISHING if promoted else JobState.SUCCEEDED)


def test_the_adapter_of_another_is_never_overwritten() -> None:
    other = replace(observed(), result=adapter(uri="hf://org/other"))
    found = only(plan(other, session=session(), trainer=trainer(trained())))
    assert found.promote is None
    assert condition(found, "Completed") == ("True", "NameTaken")


# --- the end of the object ---------------------------------------------------------------


def test_a_finished_job_is_deleted_after_its_time_and_not_before() -> None:
    ended = observed(status={"state": "Succeeded", "finishedAt": "2023-11-14T22:13:20Z"}, ttlAfterFinished="1h")
    before = only(plan(ended, now=NOW + 3599))
    assert (before.delete_object, before.requeue_at) == (False, NOW + 3600)
    assert only(plan(ended, now=NOW + 3600)).delete_object


def test_a_deleted_job_leaves_the_trainer_then_its_files_are_deleted_then_it_goes() -> None:
    gone = observed()
    gone = replace(gone, job=replace(gone.job, meta=replace(gone.job.meta, deleting=True)))
    first = only(plan(gone, session=session(), trainer=trainer(report())))
    assert (first.unregister, first.delete_data, first.finalizers) == (True, False, None)
    second = only(plan(gone, session=session(), trainer=trainer()))
    assert (second.delete_data, second.finalizers) == (True, None)
    third = only(plan(replace(gone, deleted_data=True), session=session(), trainer=trainer()))
    assert (third.delete_data, third.finalizers) == (False, ())


def test_nothing_is_planned_while_the_base_may_only_be_unlisted() -> None:
    found = plan(observed(), base=None, base_may_exist=True)
    assert (found.jobs, found.start) == ((), ())


def test_the_trainer_starts_with_the_environment_of_its_pod() -> None:
    (made,) = plan(observed(), tls=True).start
    container = made["spec"]["template"]["spec"]["containers"][0]
    environment = {item["name"]: str(item.get("value") or "pod-uid") for item in container["env"]}
    settings = read(TrainerSettings, environment)
    assert (settings.model, settings.base_label, settings.idle_after_s) == ("hf://org/base", "team/tiny", 120.0)
