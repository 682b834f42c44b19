"""The status of a BaseModel, from what was observed.

`Ready=True` means that a request would be answered, at once or after a start. A failed start is reported until a
replica serves. `Stalled` and `Reconciling` follow kstatus.
"""

from __future__ import annotations

from lorapool_api.basemodel import AdapterCounts, BaseModelStatus, PodStatus, StartStatus
from lorapool_api.chat import ChatReport
from lorapool_api.common import BaseCondition, Reason, set_conditions
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions.base_source import BaseSource, first_inspection, unusable
from lorapool_operator.decisions.model_names import granted_name, name_conflict
from lorapool_operator.decisions.plan import ConditionValue, PlanSettings
from lorapool_operator.decisions.pods import selector_text
from lorapool_operator.decisions.profile_checks import profile_problem
from lorapool_operator.decisions.scaling import starts
from lorapool_operator.decisions.scaling.rollout import RolloutDecision
from lorapool_operator.decisions.scaling.scale import ScaleDecision, lowest_replicas
from lorapool_operator.world.observed import ObservedBase

RESTART_REPORT_S = 3600.0
"""A process that ended is reported for this long after its pod is ready again."""
TOKEN_REFUSED = "the runtime refuses the operator's token; if that lasts for minutes after a rotation, restart the pod."


def status_of(
    observed: ObservedBase,
    source: BaseSource,
    decision: ScaleDecision,
    replacing: RolloutDecision,
    now: float,
    settings: PlanSettings,
) -> tuple[BaseModelStatus | None, float | None]:
    """Returns the new status if it differs, and when the last use is due to be written."""
    base, before = observed.base, observed.base.status
    start = starts.next_start(
        observed,
        decision.replicas,
        floor=observed.floor,
        startable=can_start(observed, source),
        now=now,
        settings=settings,
    )
    values = conditions_of(observed, source, decision, replacing, start, now)
    alive = [pod for pod in observed.pods if not pod.terminating]
    facts = source.facts
    after = BaseModelStatus(
        observed_generation=base.meta.generation,
        conditions=set_conditions(before.conditions, values, generation=base.meta.generation, now=iso(now)),
        replicas=len(alive),
        ready_replicas=sum(1 for runtime in observed.runtimes if runtime.serving),
        selector=selector_text(base, observed.profile),
        served_name=granted_name(base, observed.name_holder),
        revision=facts.revision if facts is not None else before.revision,
        digest=(facts.digest or None) if facts is not None else before.digest,
        state=values[BaseCondition.READY.value][1],
        adapters=counts(observed),
        pods=_pods(observed),
        modules=before.modules or observed.modules,
        chat=_chat(observed),
        start=start,
        last_used=before.last_used,
    )
    if _only_pending(observed, source):
        return None, None
    known = [runtime for runtime in observed.runtimes if runtime.snapshot is not None]
    last = max((item.local_time(item.snapshot.last_request_unix_s) for item in known if item.snapshot), default=0.0)
    shown = unix(before.last_used) or 0.0
    if int(last) > int(shown):
        if after != before or last >= shown + settings.usage_interval_s or before.last_used is None:
            return after.model_copy(update={"last_used": iso(last)}), None
        return None, shown + settings.usage_interval_s
    return (after if after != before else None), None


def _chat(observed: ObservedBase) -> ChatReport | None:
    """Returns how a runtime writes requests for the base; what was observed last while none serves."""
    reports = [runtime.current.base.chat for runtime in observed.runtimes if runtime.current is not None]
    return next((report for report in reports if report is not None), observed.base.status.chat)


def _only_pending(observed: ObservedBase, source: BaseSource) -> bool:
    """True during the first inspection, which is not reported, so that it costs one status write, not two."""
    return source.condition[1] == Reason.PENDING and not observed.base.status.conditions and not observed.pods


def counts(observed: ObservedBase) -> AdapterCounts:
    """Counts the adapters that name this base, by state."""
    return AdapterCounts(
        total=len(observed.adapters),
        ready=sum(1 for item in observed.adapters if item.ready),
        loaded=sum(1 for item in observed.adapters if item.loaded),
        failed=sum(1 for item in observed.adapters if item.failed),
    )


def conditions_of(
    observed: ObservedBase,
    source: BaseSource,
    decision: ScaleDecision,
    replacing: RolloutDecision,
    start: StartStatus | None,
    now: float,
) -> dict[str, ConditionValue]:
    """Returns the value of each condition type. `start` is what the status will remember of failed starts."""
    available = _available(observed, source, decision, start, now)
    progressing = replacing.progressing if blocked_by(observed) is None else None
    progressing = progressing or _progressing(observed, decision, start)
    values = {
        BaseCondition.SOURCE_RESOLVED.value: source.condition,
        BaseCondition.RUNTIME_AVAILABLE.value: available,
        BaseCondition.READY.value: _ready(observed, available, now),
        BaseCondition.PROGRESSING.value: progressing,
    }
    if (conflict := name_conflict(observed.base, observed.name_holder)) is not None:
        values[BaseCondition.NAME_CONFLICT.value] = conflict
    stalled = _stalled(observed, source, decision, start)
    if stalled is not None:
        values[BaseCondition.STALLED.value] = ("True", stalled[1], stalled[2])
    elif progressing[0] == "True":
        values[BaseCondition.RECONCILING.value] = ("True", progressing[1], progressing[2])
    return values


def _available(
    observed: ObservedBase, source: BaseSource, decision: ScaleDecision, start: StartStatus | None, now: float
) -> ConditionValue:
    """RuntimeAvailable: whether a replica serves now."""
    serving = sum(1 for runtime in observed.runtimes if runtime.serving)
    if serving:
        wanted, restarted = decision.replicas, _restarted(observed, now)
        trouble = _trouble(observed, start) if serving < wanted else starts.problem(observed)
        notes = (f"{serving} of {wanted} replicas serve.", trouble, restarted, _pins(observed))
        reason = Reason.DEGRADED if serving < wanted or restarted else Reason.AVAILABLE
        return ("True", reason.value, " ".join(filter(None, notes)))
    blocked = blocked_by(observed)
    if blocked is not None:
        return blocked
    if unusable(observed, source):
        return ("False", source.condition[1], source.condition[2])
    if (refused := _refused(observed)) is not None:
        return ("False", refused[0].value, refused[1])
    if start is not None and start.reason is not None:
        return ("False", start.reason, _failed_start(observed, decision, start))
    if decision.replicas == 0:
        return ("False", Reason.SCALED_TO_ZERO.value, "No replica runs; a request starts one.")
    exist = f"{len(observed.pods)} of {decision.replicas} pods exist, none serves yet. {_trouble(observed, start)}"
    return ("False", Reason.STARTING.value, exist.strip())


def _failed_start(observed: ObservedBase, decision: ScaleDecision, start: StartStatus) -> str:
    """Returns what is wrong with the attempts to start, and what happens next."""
    if decision.replicas == 0:
        lowest = lowest_replicas(observed.base.spec.scaling, observed.floor)
        return f"{(start.message or '').rstrip('.')}; {starts.waiting_text(start, lowest)}."
    if starts.failed_in_attempt(start):
        return start.message or ""
    failed = "a failed start" if start.failures == 1 else f"{start.failures} failed starts"
    return f"Starting again after {failed}: {start.message}"


def _trouble(observed: ObservedBase, start: StartStatus | None) -> str:
    """Returns why not all replicas serve: a problem of a pod, or how far the start is."""
    refused = _refused(observed)
    text = starts.problem(observed) or (refused[1] if refused is not None else "") or starts.progress_text(start)
    waits = [pod.meta.name for pod in observed.workers if not pod.ready and not pod.terminating]
    return text or (f"Not ready: worker {', '.join(sorted(waits)[:3])}." if waits else "")


def _refused(observed: ObservedBase) -> tuple[Reason, str] | None:
    """Returns why operator and runtime do not accept each other: the token of the one, the certificate of the other."""
    for runtime in observed.runtimes:
        if runtime.token_refused:
            return Reason.TOKEN_REFUSED, f"Pod {runtime.pod}: {TOKEN_REFUSED}"
        if runtime.distrust:
            return Reason.CERTIFICATE_REFUSED, f"Pod {runtime.pod}: {runtime.distrust}"
    return None


def _restarted(observed: ObservedBase, now: float) -> str:
    """Returns which pod's process ended lately and was started again, which its readiness does not show."""
    for pod in observed.pods:
        if pod.restarts and not pod.terminating and now < pod.last_exit_unix_s + RESTART_REPORT_S:
            times = "once" if pod.restarts == 1 else f"{pod.restarts} times"
            return f"Pod {pod.meta.name} was restarted {times}, last after {pod.last_exit}."
    return ""


def _pins(observed: ObservedBase) -> str:
    """Returns which adapters keep more replicas running than the base's own minReplicas."""
    lowest = observed.base.spec.scaling.min_replicas
    names = sorted(item.display for item in observed.adapters if item.warm_replicas > lowest)
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"Kept running by minReplicas of {names[0]}{more}."


def _ready(observed: ObservedBase, available: ConditionValue, now: float) -> ConditionValue:
    """Ready: whether a request would be answered, either now or after starting a base that is scaled to zero."""
    if available[0] == "True":
        blocked = blocked_by(observed)
        if blocked is not None:
            return ("True", Reason.DEGRADED.value, f"{available[2]} {blocked[2]}")
        return ("True", (Reason.DEGRADED if _restarted(observed, now) else Reason.READY).value, available[2])
    if available[1] == Reason.SCALED_TO_ZERO:
        return ("True", Reason.SCALED_TO_ZERO.value, available[2])
    return ("False", available[1], available[2])


def _progressing(observed: ObservedBase, decision: ScaleDecision, start: StartStatus | None) -> ConditionValue:
    blocked = blocked_by(observed)
    if blocked is not None:
        return ("False", blocked[1], f"{blocked[2]} Pods that run keep their configuration.")
    alive = [pod for pod in observed.pods if not pod.terminating]
    ready = sum(1 for pod in alive if pod.ready)
    if len(alive) != decision.replicas or ready < decision.replicas:
        message = f"{decision.replicas} replicas wanted ({decision.reason}), {len(alive)} exist, {ready} are ready."
        return ("True", Reason.STARTING.value, f"{message} {_trouble(observed, start)}".strip())
    if decision.replicas == 0 and start is not None and start.reason is not None:
        return ("False", start.reason, _failed_start(observed, decision, start))
    return ("False", Reason.STABLE.value, "")


def _stalled(
    observed: ObservedBase, source: BaseSource, decision: ScaleDecision, start: StartStatus | None
) -> ConditionValue | None:
    """Returns the failure after which nothing changes until a person, or a request, acts."""
    blocked = blocked_by(observed)
    if blocked is not None:
        return blocked
    if unusable(observed, source) and source.failure is not None and not source.failure.repeated:
        return source.condition
    if decision.replicas == 0 and start is not None and start.reason is not None:
        return ("False", start.reason, _failed_start(observed, decision, start))
    if observed.profiles_problem:
        return ("False", Reason.PROFILES_UNREADABLE.value, _stale_profiles(observed))
    return None


def _stale_profiles(observed: ObservedBase) -> str:
    return (
        f"The changed runtime profiles cannot be read, so the previous ones stay in force: {observed.profiles_problem}."
        " Correct the chart's value runtimeProfiles."
    )[:1024]


def _no_profile(observed: ObservedBase) -> ConditionValue:
    name = observed.base.spec.runtime_profile
    if observed.profile_denied:
        message = (
            f"spec.runtimeProfile {name!r} is not for this namespace; name another or add it to allowedNamespaces."
        )
        return ("False", Reason.PROFILE_NOT_PERMITTED.value, message)
    message = f"spec.runtimeProfile {name!r} names no profile of the chart's runtimeProfiles; name one or add it there."
    return ("False", Reason.PROFILE_NOT_FOUND.value, message)


def _pods(observed: ObservedBase) -> list[PodStatus]:
    """Returns the pods with the boot ids that their runtimes report."""
    views = {runtime.pod_uid: runtime for runtime in observed.runtimes}
    found = []
    for pod in observed.pods:
        view = views.get(pod.meta.uid)
        now = view.current if view is not None else None
        found.append(
            PodStatus(
                name=pod.meta.name,
                uid=pod.meta.uid,
                boot_id=now.boot_id if now is not None else None,
                ready=view is not None and view.serving,
                draining=pod.terminating or (now is not None and now.draining),
            )
        )
    return sorted(found, key=lambda item: item.name)[:100]


def blocked_by(observed: ObservedBase) -> ConditionValue | None:
    """Returns why the pods cannot be made, or not as the spec says now; None if they can."""
    if observed.child_problem is not None:
        return ("False", observed.child_problem.reason.value, observed.child_problem.message)
    if observed.profile is None:
        return _no_profile(observed)
    problem = profile_problem(observed.profile, observed.image, observed.base.meta.name)
    if problem is not None:
        message = f"The runtime profile {observed.base.spec.runtime_profile!r} cannot be used: {problem.message}"
        return ("False", problem.reason.value, message)
    return None


def can_start(observed: ObservedBase, source: BaseSource) -> bool:
    """True if pods can be made, so that an attempt to start the base is under way."""
    impossible = unusable(observed, source) or first_inspection(observed, source)
    return blocked_by(observed) is None and not impossible
