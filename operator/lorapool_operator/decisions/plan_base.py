"""Plans what is to be done about one BaseModel.

Children follow the spec. The number of replicas follows the load through the scale subresource, so that gateways,
autoscalers and people see and change the same field.

    profile, source  ->  scale  ->  children  ->  status
"""

from __future__ import annotations

from dataclasses import replace

from lorapool_api.basemodel import BaseModelStatus
from lorapool_api.common import BaseCondition, Condition, Reason
from lorapool_api.protocol import PreloadList
from lorapool_artifacts.policy import SourceRules
from lorapool_operator.decisions.base_source import BaseSource, first_inspection, source_of, unusable
from lorapool_operator.decisions.base_status import can_start, status_of
from lorapool_operator.decisions.manifests import NO_PRELOAD, children, template_hash
from lorapool_operator.decisions.plan import BasePlan, KubeEvent, KubeEventType, PlanSettings, Unregister
from lorapool_operator.decisions.pods import Manifest, content_hash
from lorapool_operator.decisions.profile_checks import profile_problem
from lorapool_operator.decisions.scaling import rollout, starts
from lorapool_operator.decisions.scaling.failing_group import without_failing_group
from lorapool_operator.decisions.scaling.hot_set import hot_set
from lorapool_operator.decisions.scaling.preemption import standing_of
from lorapool_operator.decisions.scaling.scale import Load, ScaleDecision, decide, initial_replicas, lowest_replicas
from lorapool_operator.decisions.scaling.stopping import deletion_costs, hand_over
from lorapool_operator.world.cluster_cache import WorkloadObject
from lorapool_operator.world.observed import ObservedBase, ScaleMemory, Standing
from lorapool_operator.world.profiles import RuntimeProfile

STRAY_GRACE_S = 10.0
"""A gateway may register a new adapter with a runtime before the operator's own watch delivers it."""
SCALED, PREEMPTED, PROFILE_CHANGED = "Scaled", "Preempted", "ProfileChanged"
PREEMPTED_BY = "preempted by the waking base"
LACKING_RECHECK_S = 5.0
"""A base that waits for devices looks this often for an idle base that occupies them."""
REFUSALS_EVERY_S = 10.0
"""A LeaderWorkerSet reports no pods that are refused: their StatefulSets' events are read so often while some lack."""
DEGRADED = (BaseCondition.READY, Reason.DEGRADED)


def plan_base(observed: ObservedBase, now: float, settings: PlanSettings) -> BasePlan:
    """Returns the whole plan; the same observation, time and settings give the same plan."""
    source, job, source_due = source_of(observed, now, settings)
    current = observed.base.spec.replicas
    decision, standing = _replicas(observed, source, now, settings)
    decision = without_failing_group(observed, decision, current, now, settings)
    decision = hand_over(observed, decision, current, now)
    foreign = observed.workload is not None and observed.workload.owner_uid != observed.base.meta.uid
    run = replace(decision, replicas=min(decision.replicas, observed.base.spec.scaling.max_replicas))
    made = _children(observed, source, run.replicas) if not foreign else ()
    replacing = rollout.decide(observed, template_hash(made), settings.max_concurrent_rollouts, now)
    hot = hot_set(observed, replacing)
    if replacing.paused and observed.workload is None:
        made = ()  # the other kind keeps running
    elif replacing.paused or hot.adapters:
        made = _children(observed, source, run.replicas, preload=hot, paused=replacing.paused)
    made_hash = content_hash({"children": list(made)}) if made else ""
    apply, apply_due = _apply(observed, made_hash, now) if made else (False, None)
    status, last_used_due = status_of(observed, source, run, replacing, now, settings)
    read, refusals_due = _refusals(observed, now)
    give_up = None
    if can_start(observed, source):
        start = observed.base.status.start
        give_up = starts.give_up_at(observed, start, floor=observed.floor, settings=settings)
        if status is not None and starts.given_up(status.start):
            give_up = now
    due = (
        source_due,
        decision.recheck_unix_s,
        last_used_due,
        _stray_due(observed, now),
        refusals_due,
        replacing.recheck_unix_s,
        now + LACKING_RECHECK_S if standing.lacks else None,
        apply_due,
        give_up,
    )
    return BasePlan(
        status=status,
        children=made if apply else (),
        children_hash=made_hash,
        remove=_superfluous(observed),
        scale_to=decision.replicas if decision.replicas != current else None,
        read_refusals=read,
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
    floor = observed.floor
    current = spec.replicas if spec.replicas is not None else initial_replicas(spec.scaling, floor)
    if unusable(observed, source):
        return ScaleDecision(current, "the source cannot be used", ScaleMemory(), None), Standing()
    if _profile(observed) is None:
        return ScaleDecision(current, "the profile cannot be used", ScaleMemory(), None), Standing()
    load = _load(observed, current)
    standing = standing_of(observed, load, lowest_replicas(spec.scaling, floor))
    if observed.yields_to is not None and standing.idle_since_unix_s is not None:
        return ScaleDecision(0, f"{PREEMPTED_BY} {observed.yields_to}", ScaleMemory(), None), Standing()
    gated = starts.gate(observed, current, floor=floor, now=now, settings=settings)
    if gated is not None:
        return gated, standing
    decision = decide(
        current,
        spec.scaling,
        load,
        observed.memory,
        floor=floor,
        now=now,
        start_allowance_s=starts.allowance_s(observed, settings),
    )
    if decision.replicas == 0 < current and not any(pod.ready for pod in observed.pods):
        # an attempt to start is only given up by `starts`
        return ScaleDecision(current, "starting", ScaleMemory(), None), standing
    return decision, standing


def _profile(observed: ObservedBase) -> RuntimeProfile | None:
    """Returns the base's profile if pods can be made from it."""
    profile = observed.profile
    if profile is None or profile_problem(profile, observed.image, observed.base.meta.name) is not None:
        return None
    return profile


def _apply(observed: ObservedBase, made_hash: str, now: float) -> tuple[bool, float | None]:
    """Returns whether to apply the children now, and when to try again what the API server refused."""
    if made_hash != observed.applied_hash:
        return True, None
    if observed.child_problem is not None:
        waits = now < observed.apply_retry_unix_s
        return not waits, observed.apply_retry_unix_s if waits else None
    return observed.apply_again or observed.workload is None, None


def _refusals(observed: ObservedBase, now: float) -> tuple[tuple[str, ...], float | None]:
    """Returns the StatefulSets that lack pods whose refusals are to be read now, and when to read them next."""
    if not observed.short_sets or observed.base.spec.replicas == 0:
        return (), None
    at = observed.refusals_read_unix_s + REFUSALS_EVERY_S
    return (observed.short_sets, now + REFUSALS_EVERY_S) if now >= at else ((), at)


def _superfluous(observed: ObservedBase) -> tuple[WorkloadObject, ...]:
    """Returns what must make no pods any more. The other kind goes once the one that replaces it exists."""
    uid, now, other = observed.base.meta.uid, observed.workload, observed.other_workload
    foreign = tuple(item for item in (now, other) if item is not None and item.owner_uid != uid)
    replaced = now is not None and now.owner_uid == uid and other is not None and other.owner_uid == uid
    return (*foreign, other) if replaced and other is not None else foreign


def _children(
    observed: ObservedBase,
    source: BaseSource,
    replicas: int,
    *,
    preload: PreloadList = NO_PRELOAD,
    paused: bool = False,
) -> tuple[Manifest, ...]:
    profile = _profile(observed)
    if profile is None or observed.base.meta.deleting:
        return ()
    if first_inspection(observed, source) or unusable(observed, source):
        return ()
    made = children(
        observed.base,
        profile,
        observed.image,
        replicas=replicas,
        token_sha256=observed.token_sha256,
        rules=observed.source_rules or SourceRules(owner=observed.base.meta.namespace),
        preload=preload,
        paused=paused,
        tls=observed.serves_tls,
    )
    return tuple(made)


def _load(observed: ObservedBase, wanted: int) -> Load:
    alive = [runtime for runtime in observed.runtimes if not runtime.terminating]
    answers = [runtime.current for runtime in alive if runtime.current is not None]
    asked = [observed.base.meta.created_unix_s, observed.woken_unix_s]
    asked += [pod.meta.created_unix_s for pod in observed.pods if not pod.terminating]
    used = [
        runtime.local_time(at)
        for runtime in alive
        if runtime.current is not None
        for at in (
            runtime.current.started_unix_s,
            runtime.current.ready_unix_s,
            runtime.current.last_request_unix_s,
        )
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


def _events(
    observed: ObservedBase, status: BaseModelStatus | None, decision: ScaleDecision, current: int | None
) -> tuple[KubeEvent, ...]:
    events = []
    if current is not None and decision.replicas != current:
        message = f"From {current} to {decision.replicas}: {decision.reason}."
        reason = PREEMPTED if decision.reason.startswith(PREEMPTED_BY) else SCALED
        events.append(KubeEvent(KubeEventType.NORMAL, reason, message))
    if observed.profile_changed:
        message = f"The runtime profile {observed.base.spec.runtime_profile!r} changed; the pods are replaced."
        events.append(KubeEvent(KubeEventType.NORMAL, PROFILE_CHANGED, message))
    if status is None:
        return tuple(events)
    known = {item.reason for item in observed.base.status.conditions if _warns(item)}
    for item in status.conditions:
        if _warns(item) and item.reason not in known:
            events.append(KubeEvent(KubeEventType.WARNING, item.reason, item.message))
    return tuple({event.reason: event for event in events}.values())


def _warns(condition: Condition) -> bool:
    """True for a condition that a person should notice."""
    if (
        condition.type in (BaseCondition.STALLED, BaseCondition.NAME_CONFLICT)
        or (condition.type, condition.reason) == DEGRADED
    ):
        return condition.status == "True"
    expected = (Reason.STARTING, Reason.SCALED_TO_ZERO, Reason.STABLE)
    return condition.status == "False" and condition.reason not in expected
