"""The attempts to start a base, as its status remembers them until one succeeds.

An attempt begins when replicas are wanted and none serves. It ends when a replica serves, which forgets all failures,
or when no replica is wanted any more. A base that cannot run is given up after `allowance_s`, if its bounds permit:
first its status gets `retryAt`, then its replicas are removed, so that no gateway starts it again in between. A changed
spec or profile starts it at once, so that a correction shows.

A LeaderWorkerSet replaces a group at once when the process of one of its pods ends, without a back-off. An attempt of a
base with groups is therefore given up as soon as the process of a pod that it started has failed, whatever its bounds.
So is any attempt whose runtime says that it cannot start, such as on a GPU that is too old: no restart changes that.

    attempt  ->  failed (reason of a pod)  ->  given up, retryAt  ->  next attempt  ->  ...  ->  serves: forgotten
"""

from __future__ import annotations

from lorapool_api.basemodel import StartStatus
from lorapool_api.common import Reason
from lorapool_api.protocol import StartupReport
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions.plan import PlanSettings
from lorapool_operator.decisions.pods import content_hash, pod_template
from lorapool_operator.decisions.scaling.scale import ScaleDecision, initial_replicas, lowest_replicas
from lorapool_operator.world.observed import ObservedBase, ScaleMemory
from lorapool_operator.world.problems import REFUSALS, reason_of

PROGRESS_INTERVAL_S = 10.0
"""The progress of a download is written to the status this often."""
PROCESS_FAILURES = (
    Reason.CRASH_LOOPING, Reason.OUT_OF_MEMORY, Reason.SHARED_MEMORY_FULL, Reason.GROUP_ENDED, *REFUSALS,
)  # fmt: skip
"""The process of a pod ended by itself."""
CLOCK_TOLERANCE_S = 30.0
"""The API server's clock, by which pods were created, may be behind ours. No group serves and fails so soon."""
ENDED_PODS_S = 60.0
"""A pod that ended this long before the attempt began is the reason for the attempt."""


def allowance_s(observed: ObservedBase, settings: PlanSettings) -> float:
    """Returns how long an attempt may take: scheduling and image pull, and the profile's time to load the base."""
    profile = observed.profile
    return settings.start_allowance_s + (profile.startup_timeout_seconds if profile is not None else 0)


def gate(
    observed: ObservedBase, current: int, *, floor: int, now: float, settings: PlanSettings
) -> ScaleDecision | None:
    """Returns the number of replicas where the attempts to start decide it; None where the load does."""
    start, scaling = observed.base.status.start, observed.base.spec.scaling
    if start is None:
        return None
    if current == 0 and start.reason is not None:
        if _changed(observed, start):
            wanted = max(1, initial_replicas(scaling, floor))
            return ScaleDecision(wanted, "the configuration changed after a failed start", ScaleMemory(), None)
        retry_at = unix(start.retry_at)
        if retry_at is not None and now < retry_at:
            return ScaleDecision(0, "a failed start is not repeated yet", ScaleMemory(), retry_at)
    if current == 0 or not given_up(start):
        return None
    reason = f"not started within {allowance_s(observed, settings):.0f}s"
    if _hopeless(observed, start):
        reason = f"a runtime failed and is not started again at once: {start.reason}"
    return ScaleDecision(0, reason, ScaleMemory(), None)


def give_up_at(
    observed: ObservedBase, start: StartStatus | None, *, floor: int, settings: PlanSettings
) -> float | None:
    """Returns when the attempt is given up; None if none runs, or if its replicas must not be removed."""
    since = unix(start.since) if start is not None and start.retry_at is None else None
    if start is None or since is None or any(pod.ready for pod in observed.pods):
        return None
    if _hopeless(observed, start):
        return unix(start.failed_at)
    if lowest_replicas(observed.base.spec.scaling, floor) > 0:
        return None
    return since + allowance_s(observed, settings)


def given_up(start: StartStatus | None) -> bool:
    """True for an attempt whose replicas are to be removed now."""
    return start is not None and start.since is not None and start.retry_at is not None


def _hopeless(observed: ObservedBase, start: StartStatus) -> bool:
    """True if a runtime of this attempt cannot start, or if one of a group failed, whose other pods then end too."""
    groups = observed.profile is not None and observed.profile.nodes > 1
    return failed_in_attempt(start) and start.reason in (PROCESS_FAILURES if groups else REFUSALS)


def next_start(
    observed: ObservedBase, wanted: int, *, floor: int, startable: bool, now: float, settings: PlanSettings
) -> StartStatus | None:
    """Returns what the status remembers of the attempts. `startable` is False while no pod can be made at all."""
    before = observed.base.status.start
    if any(runtime.serving for runtime in observed.runtimes):
        return None
    if wanted == 0:
        return _between(before, now, settings)
    if not startable:
        return before
    start = before if before is not None and before.since is not None else _begin(before, now)
    start = _with_progress(_with_failure(observed, start, now, settings), observed, now)
    give_up = give_up_at(observed, start, floor=floor, settings=settings)
    return start if give_up is None or now < give_up else _given_up(observed, start, now, settings)


def problem(observed: ObservedBase, since: float | None = None) -> str:
    """Returns why the base does not run: the problem of a pod, or of the Deployment. Empty if there is none.

    A pod that ended counts if it did so during the attempt that began at `since`, or caused it.
    """
    if observed.pods_refused or observed.workers or any(pod.group is not None for pod in observed.pods):
        return _problem_of_groups(observed, since)
    for pod in observed.pods:
        if pod.problem and not pod.terminating:
            return f"{pod.problem} (Pod {pod.meta.name})"
    if observed.workload is not None and observed.workload.problem:
        return observed.workload.problem
    ended = [pod for pod in observed.pods if pod.problem and pod.ended_unix_s and not pod.meta.deleting]
    last = max(ended, key=lambda pod: pod.ended_unix_s, default=None)
    if last is None or since is None or last.ended_unix_s < since - ENDED_PODS_S:
        return ""
    return f"{last.problem} (Pod {last.meta.name})"


def _problem_of_groups(observed: ObservedBase, since: float | None) -> str:
    """Returns the problem of a pod in a group, whose controller replaces all pods when one fails.

    The pods of a group that failed are often terminating by the time at which they are observed. For the attempt that
    began at `since` only those count that it started: what ended before is its cause, or counted already.
    """
    pods, start = (*observed.pods, *observed.workers), observed.base.status.start
    counted = (unix(start.failed_at) or 0.0) if start is not None else 0.0
    for pod in pods:
        if pod.disruption:
            lost = f"WorkerLost: Kubernetes ends Pod {pod.meta.name} ({pod.disruption}); its group starts again."
            return f"{lost} If it stays in state Terminating because its node is gone, delete the Node object."
    for pod in pods:
        text = pod.last_crash or pod.problem
        ours = since is None or pod.meta.created_unix_s >= max(since - CLOCK_TOLERANCE_S, counted)
        if text and ours and (not pod.terminating or since is not None):
            return f"{text} (Pod {pod.meta.name})"
    return observed.pods_refused


def progress_text(report: StartupReport | StartStatus | None) -> str:
    """Returns the progress in words, such as `Fetching the base: 31.2 of 140.0 GB, 210 MB/s.`; empty for none."""
    if report is None or report.phase is None:
        return ""
    if report.phase != "fetching":
        return "Loading the base."
    rate = report.bytes_per_s if isinstance(report, StartupReport) else report.bytes_per_second or 0
    total = f" of {report.total_bytes / 1e9:.1f}" if report.total_bytes is not None else ""
    return f"Fetching the base: {(report.fetched_bytes or 0) / 1e9:.1f}{total} GB, {rate / 1e6:.0f} MB/s."


def waiting_text(start: StartStatus, lowest: int) -> str:
    """Returns when the next attempt begins, for the message of a condition. `lowest`: the base's bound of replicas."""
    if start.retry_at is None:
        return "the next request starts another attempt"
    return f"the next attempt is at {'' if lowest else 'the first request after '}{start.retry_at}"


def _begin(before: StartStatus | None, now: float) -> StartStatus:
    return (before or StartStatus()).model_copy(update={"since": iso(now), "retry_at": None})


def _with_failure(observed: ObservedBase, start: StartStatus, now: float, settings: PlanSettings) -> StartStatus:
    """Records the present problem; the first text of a reason stays, since later ones only differ in details."""
    since = unix(start.since) or now
    text = problem(observed, since)
    reason = reason_of(text).value if text else ""
    # a node is often only being added: waiting for one is a failure after the time that it may take
    waits = reason == Reason.UNSCHEDULABLE and now < since + settings.start_allowance_s
    known = failed_in_attempt(start) and start.reason == reason and not _changed(observed, start)
    if not text or waits or known:
        return start
    return _failed(observed, start, reason, text, now)


def _failed(observed: ObservedBase, start: StartStatus, reason: str, message: str, now: float) -> StartStatus:
    before = 0 if _changed(observed, start) else start.failures
    failures = before if failed_in_attempt(start) and before else before + 1
    update = {"failures": failures, "reason": reason, "message": message[:1024], "failed_at": iso(now)}
    return start.model_copy(update={**update, "configuration": _configuration(observed)})


def failed_in_attempt(start: StartStatus) -> bool:
    """True if the present attempt has failed already."""
    failed, since = unix(start.failed_at), unix(start.since)
    return failed is not None and since is not None and failed >= since


def _given_up(observed: ObservedBase, start: StartStatus, now: float, settings: PlanSettings) -> StartStatus:
    if not failed_in_attempt(start):
        text = problem(observed, unix(start.since))
        reason = reason_of(text) if text else Reason.START_TIMEOUT
        late = f"No replica served within {allowance_s(observed, settings):.0f} s. {progress_text(start)}".strip()
        start = _failed(observed, start, reason.value, text or late, now)
    return _to_wait(start, now, settings)


def _to_wait(start: StartStatus, now: float, settings: PlanSettings) -> StartStatus:
    wait_s = min(settings.start_retry_max_s, settings.start_retry_min_s * 2.0 ** min(start.failures - 1, 20))
    return start.model_copy(update={"retry_at": iso(now + wait_s)})


def _between(before: StartStatus | None, now: float, settings: PlanSettings) -> StartStatus | None:
    """No replica is wanted: ends an attempt that still runs, whether the operator or a person removed its replicas."""
    if before is None or before.since is None:
        return before
    if before.reason is None:
        return None
    if failed_in_attempt(before) and before.retry_at is None:
        before = _to_wait(before, now, settings)
    return before.model_copy(update=_ENDED)


def _with_progress(start: StartStatus, observed: ObservedBase, now: float) -> StartStatus:
    """Adds what the runtimes report of their download, unless it was written a moment ago."""
    reports = [item.current.startup for item in observed.runtimes if item.current is not None and item.current.startup]
    first = max(reports, key=lambda item: item.fetched_bytes, default=None)
    if first is None:
        return start if start.phase is None else start.model_copy(update=_NO_PROGRESS)
    seen = unix(start.observed_at)
    if start.phase == first.phase and seen is not None and now < seen + PROGRESS_INTERVAL_S:
        return start
    return start.model_copy(
        update={
            "phase": first.phase.value,
            "fetched_bytes": first.fetched_bytes,
            "total_bytes": first.total_bytes,
            "bytes_per_second": round(first.bytes_per_s),
            "observed_at": iso(now),
        }
    )


_NO_PROGRESS = dict.fromkeys(("phase", "fetched_bytes", "total_bytes", "bytes_per_second", "observed_at"))
_ENDED = {**_NO_PROGRESS, "since": None}


def _changed(observed: ObservedBase, start: StartStatus) -> bool:
    """True if the pods would be configured in another way than those that failed."""
    now = _configuration(observed)
    return None not in (start.configuration, now) and start.configuration != now


def _configuration(observed: ObservedBase) -> str | None:
    if observed.profile is None:
        return None
    template = pod_template(observed.base, observed.profile, observed.image)
    return content_hash(template)
