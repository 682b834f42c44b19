"""Plans what is to be done about one BaseModel.

Children follow the spec. The number of replicas follows the load through the scale subresource, so that gateways,
autoscalers and people see and change the same field.

    profile, source  ->  scale  ->  children  ->  status
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorapool_api.basemodel import AdapterCounts, BaseModelStatus, PodStatus
from lorapool_api.common import BaseCondition, FailureReason, Reason, set_conditions
from lorapool_operator.clock import iso, retry_at_unix_s, unix
from lorapool_operator.decisions import rollout
from lorapool_operator.decisions.manifests import Manifest, children, content_hash, selector_text, template_hash
from lorapool_operator.decisions.plan import (
    BasePlan,
    ConditionValue,
    InspectionJob,
    KubeEvent,
    KubeEventType,
    PlanSettings,
    Unregister,
)
from lorapool_operator.decisions.preemption import standing_of
from lorapool_operator.decisions.rollout import RolloutDecision
from lorapool_operator.decisions.scale import Load, ScaleDecision, decide, initial_replicas, lowest_replicas
from lorapool_operator.decisions.stopping import deletion_costs, hand_over
from lorapool_operator.world.cluster_cache import find_condition
from lorapool_operator.world.observed import ObservedBase, ScaleMemory, SourceFacts, SourceFailure, Standing

STRAY_GRACE_S = 10.0
"""A gateway may register a new adapter with a runtime before the operator's own watch delivers it."""
SCALED, PREEMPTED = "Scaled", "Preempted"
PREEMPTED_BY = "preempted by the waking base"
LACKING_RECHECK_S = 5.0
"""A base that waits for devices looks this often for an idle base that occupies them."""


@dataclass(frozen=True, slots=True)
class BaseSource:
    """The state of the base's files: facts if they were found, else why not."""

    facts: SourceFacts | None
    condition: ConditionValue
    failure: FailureReason | None = None


def plan_base(observed: ObservedBase, now: float, settings: PlanSettings) -> BasePlan:
    """Returns the whole plan; the same observation, time and settings give the same plan."""
    source, job, retry_due = _source(observed, now, settings)
    current = observed.base.spec.replicas
    decision, standing = _replicas(observed, source, now, settings)
    decision = hand_over(observed, decision, current, now)
    foreign = observed.deployment is not None and observed.deployment.owner_uid != observed.base.meta.uid
    run = replace(decision, replicas=min(decision.replicas, observed.base.spec.scaling.max_replicas))
    made = _children(observed, source, run.replicas) if not foreign else ()
    replacing = rollout.decide(observed, template_hash(made), settings.max_concurrent_rollouts, now)
    if replacing.paused:
        made = _children(observed, source, run.replicas, paused=True)
    made_hash = content_hash({"children": list(made)}) if made else ""
    missing = observed.deployment is None and not observed.child_conflict
    apply = bool(made) and (made_hash != observed.applied_hash or observed.apply_again or missing)
    status, last_used_due = _status(observed, source, run, replacing, now, settings)
    lacking_due = now + LACKING_RECHECK_S if standing.lacks else None
    due = (
        retry_due,
        decision.recheck_unix_s,
        last_used_due,
        _stray_due(observed, now),
        replacing.recheck_unix_s,
        lacking_due,
    )
    return BasePlan(
        status=status,
        children=made if apply else (),
        children_hash=made_hash,
        remove_deployment_uid=observed.deployment.meta.uid if foreign and observed.deployment is not None else None,
        scale_to=decision.replicas if decision.replicas != current else None,
        unregisters=_strays(observed, now),
        inspect=job,
        events=_events(observed, status, decision, current),
        memory=decision.memory,
        begins_rollout=apply and replacing.begins,
        standing=standing,
        deletion_costs=deletion_costs(observed, decision, current),
        requeue_at=min((at for at in due if at is not None), default=None),
    )


def _replicas(
    observed: ObservedBase, source: BaseSource, now: float, settings: PlanSettings
) -> tuple[ScaleDecision, Standing]:
    spec = observed.base.spec
    floor = max((item.warm_replicas for item in observed.adapters), default=0)
    current = spec.replicas if spec.replicas is not None else initial_replicas(spec.scaling, floor)
    if _unusable(observed, source):
        return ScaleDecision(current, "the source cannot be used", ScaleMemory(), None), Standing()
    load = _load(observed, current)
    standing = standing_of(observed, load, lowest_replicas(spec.scaling, floor))
    if observed.yields_to is not None and standing.idle_since_unix_s is not None:
        return ScaleDecision(0, f"{PREEMPTED_BY} {observed.yields_to}", ScaleMemory(), None), Standing()
    decision = decide(
        current,
        spec.scaling,
        load,
        observed.memory,
        floor=floor,
        now=now,
        start_allowance_s=settings.start_allowance_s,
    )
    return decision, standing


def _source(
    observed: ObservedBase, now: float, settings: PlanSettings
) -> tuple[BaseSource, InspectionJob | None, float | None]:
    """Returns what is known of the files, an inspection to be started, and when to try a failed one again."""
    reported = next((r.current.base.digest for r in observed.runtimes if r.current and r.current.base.digest), None)
    if reported is not None:
        value = ("True", Reason.RESOLVED.value, f"{reported}, as loaded by a runtime.")
        return BaseSource(SourceFacts(reported, observed.base.status.revision), value), None, None
    if observed.base.spec.source.uri.startswith("pvc://"):
        return _volume_source(observed), None, None
    result = observed.inspection
    if result is None:
        recorded = _recorded_source(observed)
        if recorded is not None:
            return recorded, None, None
        value = ("Unknown", Reason.PENDING.value, "The source is being inspected.")
        return BaseSource(None, value), _job(observed, 1), None
    outcome = result.outcome
    if isinstance(outcome, SourceFacts):
        value = ("True", Reason.RESOLVED.value, f"{outcome.digest or 'Found'}, {outcome.size_bytes or 0} bytes.")
        return BaseSource(outcome, value), None, None
    return _failed(observed, outcome, now, settings)


def _volume_source(observed: ObservedBase) -> BaseSource:
    """The source is a volume, which only a runtime can read."""
    recorded = _recorded_source(observed)
    if recorded is not None and observed.base.status.digest is not None:
        return recorded
    return BaseSource(None, ("Unknown", Reason.AWAITING_RUNTIME.value, "Only a runtime can read this source."))


def _recorded_source(observed: ObservedBase) -> BaseSource | None:
    """Returns the source that the status records as resolved; it stays valid, since a base's source is immutable."""
    status = observed.base.status
    resolved = find_condition(status.conditions, BaseCondition.SOURCE_RESOLVED)
    if resolved is None or resolved.status != "True":
        return None
    facts = SourceFacts(status.digest or "", status.revision)
    return BaseSource(facts, (resolved.status, resolved.reason, resolved.message))


def _failed(
    observed: ObservedBase, failure: SourceFailure, now: float, settings: PlanSettings
) -> tuple[BaseSource, InspectionJob | None, float | None]:
    result = observed.inspection
    assert result is not None
    source = BaseSource(None, ("False", failure.reason.value, failure.message), failure.reason)
    if result.fingerprint != observed.fingerprint:
        return source, _job(observed, 1), None
    if not failure.reason.transient:
        return source, None, None
    due = retry_at_unix_s(
        result.at_unix_s,
        result.attempt,
        result.jitter,
        first_s=settings.retry_min_s,
        longest_s=settings.retry_max_s,
        asked_s=failure.retry_after_s,
    )
    if now < due:
        return source, None, due
    return source, _job(observed, result.attempt + 1), None


def _job(observed: ObservedBase, attempt: int) -> InspectionJob | None:
    """Returns the inspection to be started; None while one is running."""
    base = observed.base
    if observed.running is not None:
        return None
    return InspectionJob(
        key=base.key,
        uid=base.meta.uid,
        fingerprint=observed.fingerprint,
        attempt=attempt,
        uri=base.spec.source.uri,
        revision=base.spec.source.revision,
        digest=None,
        base_uid=None,
        max_rank=base.spec.lora.max_rank,
    )


def _unusable(observed: ObservedBase, source: BaseSource) -> bool:
    """True if no replica runs and none could start, so that no pod is created only to fail."""
    terminal = source.failure is not None and not source.failure.transient
    return terminal and not any(pod.ready for pod in observed.pods)


def _children(
    observed: ObservedBase, source: BaseSource, replicas: int, *, paused: bool = False
) -> tuple[Manifest, ...]:
    profile, first_inspection = observed.profile, source.condition[1] == Reason.PENDING and observed.deployment is None
    if profile is None or first_inspection or _unusable(observed, source):
        return ()
    token = observed.token_sha256
    return tuple(children(observed.base, profile, observed.image, replicas=replicas, token_sha256=token, paused=paused))


def _load(observed: ObservedBase, wanted: int) -> Load:
    alive = [runtime for runtime in observed.runtimes if not runtime.terminating]
    answers = [runtime.current for runtime in alive if runtime.current is not None]
    asked = [observed.base.meta.created_unix_s, observed.woken_unix_s]
    asked += [pod.meta.created_unix_s for pod in observed.pods if not pod.terminating]
    used = [
        runtime.local_time(at)
        for runtime in alive
        if runtime.current is not None
        for at in (runtime.current.started_unix_s, runtime.current.last_request_unix_s)
    ]
    return Load(
        in_flight=sum(snapshot.in_flight + snapshot.waiting for snapshot in answers),
        silent=sum(1 for runtime in alive if runtime.ready and runtime.current is None),
        ready=min(wanted, sum(1 for runtime in alive if runtime.serving)),
        last_activity_unix_s=max(asked + used),
        asked_unix_s=max(asked),
    )


def _strays(observed: ObservedBase, now: float) -> tuple[Unregister, ...]:
    return tuple(
        Unregister(item.pod_uid, item.pod, item.adapter, item.display, verify=True)
        for item in observed.strays
        if now >= item.since_unix_s + STRAY_GRACE_S
    )


def _stray_due(observed: ObservedBase, now: float) -> float | None:
    return min((at for item in observed.strays if (at := item.since_unix_s + STRAY_GRACE_S) > now), default=None)


# --- status ------------------------------------------------------------------------------


def _status(
    observed: ObservedBase,
    source: BaseSource,
    decision: ScaleDecision,
    replacing: RolloutDecision,
    now: float,
    settings: PlanSettings,
) -> tuple[BaseModelStatus | None, float | None]:
    """Returns the new status if it differs, and when the last use is due to be written."""
    base, before = observed.base, observed.base.status
    values = conditions_of(observed, source, decision, replacing)
    alive = [pod for pod in observed.pods if not pod.terminating]
    facts = source.facts
    after = BaseModelStatus(
        observed_generation=base.meta.generation,
        conditions=set_conditions(before.conditions, values, generation=base.meta.generation, now=iso(now)),
        replicas=len(alive),
        ready_replicas=sum(1 for runtime in observed.runtimes if runtime.serving),
        selector=selector_text(base),
        revision=facts.revision if facts is not None else before.revision,
        digest=(facts.digest or None) if facts is not None else before.digest,
        state=values[BaseCondition.READY.value][1],
        adapters=counts(observed),
        pods=_pods(observed),
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
    observed: ObservedBase, source: BaseSource, decision: ScaleDecision, replacing: RolloutDecision
) -> Mapping[str, ConditionValue]:
    """Returns the value of each condition type."""
    available = _available(observed, source, decision)
    return {
        BaseCondition.SOURCE_RESOLVED.value: source.condition,
        BaseCondition.RUNTIME_AVAILABLE.value: available,
        BaseCondition.READY.value: _ready(available),
        BaseCondition.PROGRESSING.value: replacing.progressing or _progressing(observed, decision),
    }


def _available(observed: ObservedBase, source: BaseSource, decision: ScaleDecision) -> ConditionValue:
    """RuntimeAvailable: whether a replica serves now."""
    serving = sum(1 for runtime in observed.runtimes if runtime.serving)
    if serving:
        if serving < decision.replicas:
            message = f"{serving} of {decision.replicas} replicas serve. {_problem(observed)}".strip()
            return ("True", Reason.DEGRADED.value, message)
        message = f"{serving} of {decision.replicas} replicas serve. {_problem(observed)}".strip()
        return ("True", Reason.AVAILABLE.value, message)
    if observed.child_conflict:
        return ("False", Reason.NAME_CONFLICT.value, observed.child_conflict)
    if observed.profile is None:
        return ("False", Reason.PROFILE_NOT_FOUND.value, _no_profile(observed))
    if _unusable(observed, source):
        return ("False", source.condition[1], source.condition[2])
    if decision.replicas == 0:
        return ("False", Reason.SCALED_TO_ZERO.value, "No replica runs; a request starts one.")
    problem = _problem(observed)
    if problem:
        return ("False", Reason.UNAVAILABLE.value, problem)
    return ("False", Reason.STARTING.value, f"{len(observed.pods)} of {decision.replicas} pods exist, none serves yet.")


def _ready(available: ConditionValue) -> ConditionValue:
    """Ready: whether a request would be answered, either now or after starting a base that is scaled to zero."""
    if available[0] == "True":
        return ("True", Reason.READY.value, available[2])
    if available[1] == Reason.SCALED_TO_ZERO:
        return ("True", Reason.SCALED_TO_ZERO.value, available[2])
    return ("False", available[1], available[2])


def _progressing(observed: ObservedBase, decision: ScaleDecision) -> ConditionValue:
    alive = [pod for pod in observed.pods if not pod.terminating]
    ready = sum(1 for pod in alive if pod.ready)
    if len(alive) != decision.replicas or ready < decision.replicas:
        message = f"{decision.replicas} replicas wanted ({decision.reason}), {len(alive)} exist, {ready} are ready."
        return ("True", Reason.STARTING.value, f"{message} {_problem(observed)}".strip())
    return ("False", Reason.STABLE.value, "")


def _problem(observed: ObservedBase) -> str:
    for pod in observed.pods:
        if pod.problem and not pod.terminating:
            return f"Pod {pod.meta.name}: {pod.problem}"
    return observed.deployment.problem if observed.deployment is not None else ""


def _no_profile(observed: ObservedBase) -> str:
    return (
        f"spec.runtimeProfile {observed.base.spec.runtime_profile!r} names no profile of the chart's runtimeProfiles."
    )


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


def _events(
    observed: ObservedBase, status: BaseModelStatus | None, decision: ScaleDecision, current: int | None
) -> tuple[KubeEvent, ...]:
    events = []
    if current is not None and decision.replicas != current:
        message = f"From {current} to {decision.replicas}: {decision.reason}."
        reason = PREEMPTED if decision.reason.startswith(PREEMPTED_BY) else SCALED
        events.append(KubeEvent(KubeEventType.NORMAL, reason, message))
    if status is None:
        return tuple(events)
    for kind in (BaseCondition.SOURCE_RESOLVED, BaseCondition.READY):
        after = find_condition(status.conditions, kind)
        before = find_condition(observed.base.status.conditions, kind)
        bad = after is not None and after.status == "False" and after.reason != Reason.STARTING
        if after is not None and bad and (before is None or before.reason != after.reason):
            events.append(KubeEvent(KubeEventType.WARNING, after.reason, after.message))
    return tuple({event.reason: event for event in events}.values())
