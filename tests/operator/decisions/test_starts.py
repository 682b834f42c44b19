"""Failed starts of a base: reported until a start succeeds, and not repeated at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from base_world import NOW, base, condition, deployment, message, plan, pod, runtime, world

from lorapool_api.basemodel import BaseModelStatus
from lorapool_operator.decisions.plan import BasePlan
from lorapool_operator.world.cluster_cache import PodObject
from lorapool_operator.world.observed import AdapterSummary, ObservedBase
from lorapool_operator.world.profiles import RuntimeProfile

BROKEN = pod(ready=False, problem="ImagePullBackOff: no such tag")
ALLOWANCE_S = 600 + 900
"""Time to schedule the pod and to pull the image, and the profile's startupTimeoutSeconds."""


def status(made: BasePlan) -> BaseModelStatus:
    assert made.status is not None
    return made.status


def starting(*pods: PodObject, **more: Any) -> ObservedBase:
    return world(base(replicas=1), pods=pods, workload=deployment(), **more)


def later(observed: ObservedBase, now: float, **changes: Any) -> ObservedBase:
    """The world after the status of the plan for this time was written."""
    made = plan(observed, now)
    held = replace(observed.base, status=made.status or observed.base.status)
    return replace(observed, base=held, **changes)


def with_spec(observed: ObservedBase, **spec: Any) -> ObservedBase:
    changed = observed.base.spec.model_copy(update=spec)
    return replace(observed, base=replace(observed.base, spec=changed))


def given_up(observed: ObservedBase, now: float = NOW) -> ObservedBase:
    """The world after an attempt failed and its replicas were removed."""
    observed = later(observed, now)
    observed = later(observed, now + ALLOWANCE_S)
    assert plan(observed, now + ALLOWANCE_S + 1).scale_to == 0
    return later(with_spec(replace(observed, pods=()), replicas=0), now + ALLOWANCE_S + 2)


def test_a_failed_start_stays_not_ready_when_its_replicas_are_gone() -> None:
    asleep = given_up(starting(BROKEN))
    conditions = {item.type: item for item in asleep.base.status.conditions}
    assert (conditions["Ready"].status, conditions["Ready"].reason) == ("False", "ImagePullFailed")
    assert conditions["Ready"].message == (
        "ImagePullBackOff: no such tag (Pod pod); the next attempt is at the first request after 2023-11-14T22:39:20Z."
    )
    assert (conditions["Stalled"].status, conditions["Stalled"].reason) == ("True", "ImagePullFailed")
    assert plan(asleep, NOW + 90_000).status is None


def test_replicas_are_removed_only_once_the_status_forbids_to_start_them_again() -> None:
    observed = later(starting(BROKEN), NOW)
    made = plan(observed, NOW + ALLOWANCE_S)
    assert made.scale_to is None
    start = status(made).start
    assert start is not None
    assert start.retry_at == "2023-11-14T22:39:20Z"
    assert made.requeue_at is not None
    assert made.requeue_at <= NOW + ALLOWANCE_S
    observed = later(observed, NOW + ALLOWANCE_S)
    assert plan(observed, NOW + ALLOWANCE_S + 1).scale_to == 0


def test_a_base_that_only_never_serves_is_a_start_timeout() -> None:
    asleep = given_up(starting(pod(ready=False)))
    assert asleep.base.status.state == "StartTimeout"


def test_a_base_that_is_given_up_while_it_waits_for_a_node_says_so() -> None:
    waiting = pod(ready=False, problem="Unschedulable: 3 Insufficient nvidia.com/gpu.")
    profile = RuntimeProfile(startup_timeout_seconds=30)
    observed = later(starting(waiting, profile=profile), NOW)
    made = plan(observed, NOW + 630)
    assert condition(made, "Ready") == ("False", "Unschedulable")


def test_one_failure_is_one_event() -> None:
    observed = starting(BROKEN)
    reasons = []
    for at in (0, 1, ALLOWANCE_S, ALLOWANCE_S + 1):
        reasons += [note.reason for note in plan(observed, NOW + at).events]
        observed = later(observed, NOW + at)
    assert reasons == ["ImagePullFailed", "Scaled"]


def test_scaling_a_failing_base_down_by_hand_does_not_make_it_ready() -> None:
    observed = later(starting(BROKEN), NOW)
    made = plan(with_spec(replace(observed, pods=()), replicas=0), NOW + 5)
    assert condition(made, "Ready") == ("False", "ImagePullFailed")
    start = status(made).start
    assert start is not None
    assert start.retry_at == "2023-11-14T22:14:25Z"


def test_scaling_a_starting_base_down_by_hand_is_no_failure() -> None:
    observed = later(starting(pod(ready=False)), NOW)
    made = plan(with_spec(replace(observed, pods=()), replicas=0), NOW + 5)
    assert condition(made, "Ready") == ("True", "ScaledToZero")
    assert status(made).start is None


def test_each_failed_attempt_doubles_the_wait_up_to_a_bound() -> None:
    observed, now, waits = starting(BROKEN), NOW, []
    for _ in range(7):
        observed = given_up(observed, now)
        start = observed.base.status.start
        assert start is not None
        waits.append(plan(observed, now + ALLOWANCE_S + 10).requeue_at or 0.0)
        waits[-1] -= now + ALLOWANCE_S
        now += 10_000
        observed = with_spec(replace(observed, pods=(BROKEN,)), replicas=1)
    assert waits == [60, 120, 240, 480, 960, 1800, 1800]


def test_a_new_attempt_reports_the_last_failure_until_a_replica_serves() -> None:
    asleep = given_up(starting(BROKEN))
    again = with_spec(replace(asleep, pods=(pod(ready=False),)), replicas=1)
    made = plan(again, NOW + 5000)
    assert condition(made, "Ready") == ("False", "ImagePullFailed")
    assert message(made, "Ready").startswith("Starting again after a failed start: ImagePullBackOff")
    assert condition(made, "Reconciling") == ("True", "Starting")
    served = plan(replace(later(again, NOW + 5000), pods=(pod(),), runtimes=(runtime(),)), NOW + 5100)
    assert condition(served, "Ready") == ("True", "Ready")
    assert status(served).start is None


def test_pinned_adapters_wait_for_the_back_off_too() -> None:
    warm = AdapterSummary(ready=True, loaded=False, failed=False, warm_replicas=1, display="team/a")
    asleep = replace(given_up(starting(BROKEN)), adapters=(warm,))
    early = plan(asleep, NOW + ALLOWANCE_S + 30)
    assert (early.scale_to, early.requeue_at) == (None, NOW + ALLOWANCE_S + 60)
    assert plan(asleep, NOW + ALLOWANCE_S + 60).scale_to == 1


@pytest.mark.parametrize("changed", ["spec", "profile"])
def test_a_changed_configuration_is_tried_at_once(changed: str) -> None:
    asleep = given_up(starting(BROKEN))
    assert plan(asleep, NOW + ALLOWANCE_S + 10).scale_to is None
    if changed == "spec":
        corrected = with_spec(asleep, max_model_len=512)
    else:
        corrected = replace(asleep, profile=RuntimeProfile(image="runtime:corrected"))
    made = plan(corrected, NOW + ALLOWANCE_S + 10)
    assert made.scale_to == 1
    assert "configuration changed" in made.events[0].message


def test_a_change_of_the_number_of_replicas_is_no_new_configuration() -> None:
    asleep = given_up(starting(BROKEN))
    scaling = asleep.base.spec.scaling.model_copy(update={"max_replicas": 3})
    assert plan(with_spec(asleep, scaling=scaling), NOW + ALLOWANCE_S + 10).scale_to is None


def test_a_base_that_must_run_is_not_given_up() -> None:
    observed = world(base(replicas=1, scaling={"minReplicas": 1}), pods=(BROKEN,), workload=deployment())
    observed = later(observed, NOW)
    made = plan(later(observed, NOW + 90_000), NOW + 90_001)
    assert (made.scale_to, observed.base.status.state) == (None, "ImagePullFailed")


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("ErrImagePull: not found", "ImagePullFailed"),
        ("CrashLoopBackOff: the container ended with exit code 1 (Error).", "CrashLooping"),
        ("OOMKilled: the container ended with exit code 137 (OOMKilled).", "OutOfMemory"),
        ('CreateContainerConfigError: secret "x" not found', "ContainerFailed"),
        ("SomethingNew: of a later Kubernetes", "Unavailable"),
    ],
)
def test_a_problem_of_a_pod_has_a_typed_reason(problem: str, reason: str) -> None:
    made = plan(starting(pod(ready=False, problem=problem)))
    assert condition(made, "Ready") == ("False", reason)
    assert condition(made, "RuntimeAvailable") == ("False", reason)
    assert problem in message(made, "Ready")
    assert [(note.type, note.reason) for note in made.events] == [("Warning", reason)]


def test_a_pod_that_waits_for_a_node_is_starting_until_the_time_for_that_is_over() -> None:
    waiting = pod(ready=False, problem="Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    observed = later(starting(waiting), NOW)
    conditions = {item.type: item for item in observed.base.status.conditions}
    assert conditions["Ready"].reason == "Starting"
    assert "Insufficient nvidia.com/gpu" in conditions["Ready"].message
    assert plan(observed, NOW + 599).status is None
    assert condition(plan(observed, NOW + 600), "Ready") == ("False", "Unschedulable")


def test_an_evicted_pod_is_quoted_while_its_successor_starts() -> None:
    evicted = PodObject.parse(
        {
            "metadata": {
                "namespace": "team", "name": "old", "uid": "old-uid",
                "labels": {"lorapool.dev/base": "tiny", "lorapool.dev/base-uid": "base-uid"},
            },
            "status": {
                "phase": "Failed",
                "reason": "Evicted",
                "message": 'Usage of EmptyDir volume "cache" exceeds the limit "20Gi".',
                "conditions": [
                    {"type": "DisruptionTarget", "status": "True", "lastTransitionTime": "2023-11-14T22:13:10Z"}
                ],
            },
        }
    )  # fmt: skip
    made = plan(starting(evicted, pod("new", ready=False)))
    assert condition(made, "Ready") == ("False", "Evicted")
    assert 'volume "cache" exceeds the limit "20Gi"' in message(made, "Ready")
    a_day_later = plan(starting(evicted, pod("new", ready=False)), NOW + 86_400)
    assert condition(a_day_later, "Ready") == ("False", "Starting")


def test_a_pod_that_was_killed_and_runs_again_is_reported_for_a_while() -> None:
    killed = PodObject.parse(
        {
            "metadata": {
                "namespace": "team", "name": "pod", "uid": "pod-uid",
                "labels": {"lorapool.dev/base": "tiny", "lorapool.dev/base-uid": "base-uid"},
            },
            "status": {
                "phase": "Running",
                "podIP": "10.0.0.1",
                "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [
                    {
                        "restartCount": 7,
                        "state": {"running": {}},
                        "lastState": {
                            "terminated": {
                                "exitCode": 137, "reason": "OOMKilled", "finishedAt": "2023-11-14T22:10:00Z",
                            }
                        },
                    }
                ],
            },
        }
    )  # fmt: skip
    observed = starting(killed, runtimes=(runtime(),))
    made = plan(observed)
    assert condition(made, "Ready") == ("True", "Degraded")
    assert "restarted 7 times, last after exit code 137 (OOMKilled)" in message(made, "Ready")
    assert [note.reason for note in made.events] == ["Degraded"]
    assert condition(plan(observed, NOW + 7200), "Ready") == ("True", "Ready")


@pytest.mark.parametrize("timeout_s", [60, 7200])
def test_the_time_to_start_is_that_of_the_profile(timeout_s: int) -> None:
    profile = RuntimeProfile(startup_timeout_seconds=timeout_s)
    observed = later(starting(pod(ready=False), profile=profile), NOW)
    loading = replace(observed, runtimes=(replace(runtime(ready=False), ready=False),))
    early = later(loading, NOW + 600 + timeout_s - 1)
    assert plan(early, NOW + 600 + timeout_s - 1).scale_to is None
    late = later(early, NOW + 600 + timeout_s)
    assert plan(late, NOW + 600 + timeout_s + 1).scale_to == 0


def fetching(gigabytes: float) -> Any:
    report = {"phase": "fetching", "fetchedBytes": int(gigabytes * 1e9), "totalBytes": 140 * 10**9, "bytesPerS": 2.1e8}
    return replace(runtime(ready=False, startup=report), ready=False)


def test_the_progress_of_a_download_is_shown_and_written_once_in_ten_seconds() -> None:
    observed = starting(pod(ready=False), runtimes=(fetching(31.2),))
    made = plan(observed)
    assert "Fetching the base: 31.2 of 140.0 GB, 210 MB/s." in message(made, "RuntimeAvailable")
    assert "Fetching the base: 31.2 of 140.0 GB, 210 MB/s." in message(made, "Progressing")
    start = status(made).start
    assert start is not None
    assert (start.phase, start.fetched_bytes, start.bytes_per_second) == ("fetching", 31_200_000_000, 210_000_000)
    written = later(observed, NOW, runtimes=(fetching(33.0),))
    assert plan(written, NOW + 9).status is None
    assert "33.0 of 140.0 GB" in message(plan(written, NOW + 10), "Ready")


def test_a_refused_token_is_a_condition() -> None:
    refusing = replace(runtime(fresh=False), snapshot=None, token_refused=True)
    made = plan(starting(pod(), runtimes=(refusing,)))
    assert condition(made, "RuntimeAvailable") == ("False", "TokenRefused")
    assert "restart the pod" in message(made, "Ready")
    two = plan(
        world(
            base(replicas=2, scaling={"maxReplicas": 2}),
            pods=(pod("a"), pod("b")),
            runtimes=(runtime("a", in_flight=20), replace(refusing, pod="b", pod_uid="b-uid")),
            workload=deployment(),
        )
    )
    assert condition(two, "RuntimeAvailable") == ("True", "Degraded")
    assert "Pod b: the runtime refuses the operator's token" in message(two, "RuntimeAvailable")


def test_adapters_that_keep_a_base_running_are_named() -> None:
    warm = AdapterSummary(ready=True, loaded=True, failed=False, warm_replicas=1, display="team/pinned")
    made = plan(starting(pod(), runtimes=(runtime(),), adapters=(warm,)))
    assert message(made, "Ready") == "1 of 1 replicas serve. Kept running by minReplicas of team/pinned."
