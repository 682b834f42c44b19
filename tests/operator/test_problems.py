"""Why pods do not run, read from the status that kubelet, scheduler and controllers write."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorapool_api.common import Reason
from lorapool_operator.world.problems import deployment_problem, ended_at, last_exit, pod_problem, reason_of


def container(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"state": state, **more}


def crash(exit_code: int, reason: str, message: str = "") -> dict[str, Any]:
    return {"terminated": {"exitCode": exit_code, "reason": reason, "message": message}}


LOG_LINE = json.dumps({"level": "ERROR", "message": "the base cannot be served: 401 from the hub"})
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 2m40s restarting failed container"}}


REFUSED = json.dumps({"message": "no GPU", "reason": "GPUCountMismatch"})
NOISE = json.dumps({"message": "stopped"})


@pytest.mark.parametrize(
    ("log", "problem", "reason"),
    [
        (f"{REFUSED}\n{NOISE}\nresource_tracker: leaked", "GPUCountMismatch", Reason.GPU_COUNT_MISMATCH),
        (json.dumps({"message": "m", "reason": "GroupEnded"}), "GroupEnded", Reason.GROUP_ENDED),
        (json.dumps({"message": "m", "reason": "NoSuchReason"}), "CrashLoopBackOff", Reason.CRASH_LOOPING),
        (json.dumps({"message": "m", "reason": "QuotaExceeded"}), "CrashLoopBackOff", Reason.CRASH_LOOPING),
        ("[1]", "CrashLoopBackOff", Reason.CRASH_LOOPING),
    ],
)
def test_the_reason_that_a_runtime_gives_for_its_end_is_the_condition_s(log: str, problem: str, reason: Reason) -> None:
    found = pod_problem({"containerStatuses": [container(crash(1, "Error", log))]})
    assert (found.partition(":")[0], reason_of(found)) == (problem, reason)
    if log.startswith(REFUSED):
        assert found.endswith("exit code 1 (Error). no GPU")


@pytest.mark.parametrize(
    ("status", "problem", "reason"),
    [
        ({"containerStatuses": [container({"running": {}})]}, "", None),
        ({"containerStatuses": [container({"waiting": {"reason": "ContainerCreating"}})]}, "", None),
        ({"initContainerStatuses": [container(crash(0, "Completed"))]}, "", None),
        (
            {"containerStatuses": [container(BACK_OFF, lastState=crash(1, "Error", f"first\n{LOG_LINE}\n"))]},
            "CrashLoopBackOff: the container ended with exit code 1 (Error). "
            "the base cannot be served: 401 from the hub",
            Reason.CRASH_LOOPING,
        ),
        (
            {"containerStatuses": [container(BACK_OFF, lastState=crash(137, "OOMKilled"))]},
            "OOMKilled: the container ended with exit code 137 (OOMKilled).",
            Reason.OUT_OF_MEMORY,
        ),
        (
            {"initContainerStatuses": [container({"waiting": {"reason": "ErrImagePull", "message": "not found"}})]},
            "ErrImagePull: not found",
            Reason.IMAGE_PULL_FAILED,
        ),
        (
            {"containerStatuses": [container(crash(2, "Error", "plain text"))]},
            "CrashLoopBackOff: the container ended with exit code 2 (Error). plain text",
            Reason.CRASH_LOOPING,
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]},
            "Unschedulable: 0/3",
            Reason.UNSCHEDULABLE,
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "low on memory"},
            "Evicted: low on memory",
            Reason.EVICTED,
        ),
        (
            {"phase": "Failed", "containerStatuses": [container(crash(137, "OOMKilled"))]},
            "OOMKilled: the container ended with exit code 137 (OOMKilled).",
            Reason.OUT_OF_MEMORY,
        ),
    ],
)
def test_a_pods_problem_is_read_with_its_reason(status: dict[str, Any], problem: str, reason: Reason | None) -> None:
    assert pod_problem(status) == problem
    assert reason is None or reason_of(problem) is reason


def test_the_text_of_a_crash_loop_does_not_change_with_its_back_off() -> None:
    later = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}}
    texts = {pod_problem({"containerStatuses": [container(s, lastState=crash(1, "Error"))]}) for s in (BACK_OFF, later)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('pods "x" is forbidden: exceeded quota: gpus', Reason.QUOTA_EXCEEDED),
        ('pods "x" is forbidden: violates PodSecurity', Reason.APPLY_REFUSED),
    ],
)
def test_pods_that_cannot_be_created_are_the_deployments_problem(message: str, reason: Reason) -> None:
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": message}
    problem = deployment_problem({"conditions": [failure]})
    assert problem == f"FailedCreate: {message}"
    assert reason_of(problem) is reason


def test_the_last_exit_counts_only_after_a_restart() -> None:
    ended = {
        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled", "finishedAt": "2026-01-01T00:00:00Z"}}
    }
    killed = {"containerStatuses": [container({"running": {}}, restartCount=7, **ended)]}
    assert last_exit(killed) == (7, "exit code 137 (OOMKilled)", "2026-01-01T00:00:00Z")
    assert last_exit({"containerStatuses": [container({"running": {}}, restartCount=0)]}) == (0, "", "")


def test_an_ended_pod_ended_with_its_last_change() -> None:
    conditions = [{"lastTransitionTime": "2026-01-01T00:00:00Z"}, {"lastTransitionTime": "2026-01-02T00:00:00Z"}]
    assert ended_at({"conditions": conditions}) == "2026-01-02T00:00:00Z"
    assert ended_at({"startTime": "2026-01-01T00:00:00Z"}) == "2026-01-01T00:00:00Z"
