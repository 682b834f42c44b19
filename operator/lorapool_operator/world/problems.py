"""Why pods do not run, in the words of the kubelet, the scheduler and the API server.

A problem is a text `<reason of Kubernetes>: <details>`. `reason_of` maps it to a reason of a condition. The texts do
not count up (back-off times, numbers of restarts), so that a status that shows them is not written again and again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lorapool_api.common import Reason

MAX_CHARS = 500
SIGBUS_EXIT = 128 + 7
"""Exit code of a process that wrote to a memory-backed volume without room."""
SHARED_MEMORY = "/dev/shm"
STARTING = (None, "ContainerCreating", "PodInitializing")
PULL = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
CONTAINER = (
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "StartError",
    "ContainerCannotRun",
)
REFUSALS = (
    Reason.BASE_UNSUPPORTED,
    Reason.DEVICE_MEMORY_TOO_SMALL,
    Reason.DEVICE_UNUSABLE,
    Reason.ENGINE_REFUSED,
    Reason.GPU_COUNT_MISMATCH,
    Reason.SHARED_MEMORY_TOO_SMALL,
)
"""Why a runtime says that it cannot start. No restart changes it."""
GIVEN = {reason.value for reason in (*REFUSALS, Reason.GROUP_ENDED, Reason.OUT_OF_MEMORY)}
"""All reasons that a runtime gives for its end."""
REASONS: Mapping[str, Reason] = {
    **dict.fromkeys(PULL, Reason.IMAGE_PULL_FAILED),
    **dict.fromkeys(CONTAINER, Reason.CONTAINER_FAILED),
    "CrashLoopBackOff": Reason.CRASH_LOOPING,
    "Error": Reason.CRASH_LOOPING,
    "Completed": Reason.CRASH_LOOPING,
    "OOMKilled": Reason.OUT_OF_MEMORY,
    "SharedMemoryFull": Reason.SHARED_MEMORY_FULL,
    **{reason.value: reason for reason in REFUSALS},
    "WorkerLost": Reason.WORKER_LOST,
    "GroupEnded": Reason.GROUP_ENDED,
    "OutOfMemory": Reason.OUT_OF_MEMORY,
    "Evicted": Reason.EVICTED,
    "Preempting": Reason.EVICTED,
    "Terminated": Reason.EVICTED,
    "NodeShutdown": Reason.EVICTED,
    "Unschedulable": Reason.UNSCHEDULABLE,
    "SchedulingGated": Reason.UNSCHEDULABLE,
}


def reason_of(problem: str) -> Reason:
    """Returns the reason of a condition for a problem; `Unavailable` for one that has none of its own."""
    known = REASONS.get(problem.partition(":")[0])
    if known is not None:
        return known
    if "exceeded quota" in problem:
        return Reason.QUOTA_EXCEEDED
    return Reason.APPLY_REFUSED if problem.startswith("FailedCreate") else Reason.UNAVAILABLE


def pod_problem(status: Mapping[str, Any]) -> str:
    """Returns why the pod does not run; empty if nothing is wrong."""
    if status.get("phase") == "Failed":
        return _ended(status)
    for container in _containers(status):
        problem = _waiting(container) or _terminated(container)
        if problem:
            return problem
    for item in status.get("conditions") or ():
        if item["type"] == "PodScheduled" and item["status"] == "False":
            return _text(item.get("reason", "Unschedulable"), item.get("message", ""))
    return ""


def disruption(status: Mapping[str, Any]) -> str:
    """Returns why Kubernetes ends the pod, such as PreemptionByScheduler; empty while it does not."""
    ends = (item for item in status.get("conditions") or () if item["type"] == "DisruptionTarget")
    return next((str(item.get("reason") or "") for item in ends if item["status"] == "True"), "")


def deployment_problem(status: Mapping[str, Any]) -> str:
    """Returns why the Deployment cannot create pods; empty if nothing is wrong."""
    for item in status.get("conditions") or ():
        if item["type"] == "ReplicaFailure" and item["status"] == "True":
            return _text(item.get("reason", "ReplicaFailure"), item.get("message", ""))
    return ""


def last_exit(status: Mapping[str, Any]) -> tuple[int, str, str]:
    """Returns (restarts, reason, RFC 3339 time) of the last end of a container's process; (0, "", "") for none."""
    for container in _containers(status):
        ended = (container.get("lastState") or {}).get("terminated") or {}
        if ended and container.get("restartCount"):
            return int(container["restartCount"]), _exit(ended), str(ended.get("finishedAt") or "")
    return 0, "", ""


def last_crash(status: Mapping[str, Any]) -> str:
    """Returns how a container's process failed before its last restart, as a problem; empty if none did."""
    for container in _containers(status):
        ended = (container.get("lastState") or {}).get("terminated") or {}
        if ended.get("exitCode") and container.get("restartCount"):
            return _crash(ended)
    return ""


def ended_at(status: Mapping[str, Any]) -> str:
    """Returns the RFC 3339 time at which a pod that failed ended; empty if it is not known."""
    times = [str(item.get("lastTransitionTime") or "") for item in status.get("conditions") or ()]
    for container in _containers(status):
        times.append(str(((container.get("state") or {}).get("terminated") or {}).get("finishedAt") or ""))
    return max(times, default="") or str(status.get("startTime") or "")


def _containers(status: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _waiting(container: Mapping[str, Any]) -> str:
    waiting = (container.get("state") or {}).get("waiting") or {}
    reason = waiting.get("reason")
    if reason in STARTING:
        return ""
    ended = (container.get("lastState") or {}).get("terminated") or {}
    if reason == "CrashLoopBackOff" and ended:
        return _crash(ended)
    return _text(str(reason), waiting.get("message", ""))


def _terminated(container: Mapping[str, Any]) -> str:
    """A process that ended and is not started again yet; an init container that succeeded is no problem."""
    ended = (container.get("state") or {}).get("terminated") or {}
    return _crash(ended) if ended and ended.get("exitCode") != 0 else ""


def _crash(ended: Mapping[str, Any]) -> str:
    given, last = _last_line(ended.get("message"))
    reason = "OOMKilled" if ended.get("reason") == "OOMKilled" else given or "CrashLoopBackOff"
    if not given and (ended.get("exitCode") == SIGBUS_EXIT or SHARED_MEMORY in last):
        reason = "SharedMemoryFull"
    return _text(reason, f"the container ended with {_exit(ended)}. {last}")


def _ended(status: Mapping[str, Any]) -> str:
    if status.get("reason"):
        return _text(str(status["reason"]), status.get("message", ""))
    ended = [(item.get("state") or {}).get("terminated") or {} for item in _containers(status)]
    failed = next((item for item in ended if item.get("exitCode")), None)
    return _crash(failed) if failed is not None else _text("Error", status.get("message", ""))


def _exit(ended: Mapping[str, Any]) -> str:
    return f"exit code {ended.get('exitCode')} ({ended.get('reason') or 'Error'})"


def _last_line(message: object) -> tuple[str, str]:
    """Returns (reason, text) of the last line with a reason that the runtime gives; without one ("", the last line).

    Lines are JSON or plain. The processes of an engine may still write theirs after the runtime's last one.
    """
    lines = str(message or "").strip().splitlines()
    for line in reversed(lines):
        parsed = _parsed(line)
        if parsed.get("reason") in GIVEN:
            return str(parsed["reason"]), str(parsed.get("message", ""))
    return "", str(_parsed(lines[-1]).get("message", lines[-1])) if lines else ""


def _parsed(line: str) -> Mapping[str, Any]:
    """Returns the fields of a line of JSON; none for any other."""
    try:
        parsed = json.loads(line)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _text(reason: str, details: object) -> str:
    return " ".join(f"{reason}: {details}".split()).rstrip(":")[:MAX_CHARS]
