"""Decides what is to be done about one BaseModel. Pure: the same world and `now` give the same plan.

Called by the reconciler. Children follow the spec; the number of replicas follows load through the scale
subresource, so that gateways, autoscalers and people see and may change the same one field.

    profile, source  ->  scale  ->  children  ->  status
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorapool_api.basemodel import AdapterCounts, BaseModelStatus, PodStatus
from lorapool_api.common import BaseCondition, FailureReason, Reason, set_conditions
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions.manifests import Manifest, children, content_hash, selector_text
from lorapool_operator.decisions.plan import EventType, Failure, JudgeJob, Note, SourceFacts, Unregister
from lorapool_operator.decisions.scale import Load, ScaleDecision, ScaleMemory, decide, initial_replicas
from lorapool_operator.decisions.validity import condition
from lorapool_operator.retry import retry_at_unix_s
from lorapool_operator.world.observed import ObservedBase, PlanSettings

STRAY_GRACE_S = 10.0
"""A runtime may know an adapter before our watch does: a gateway saw it first."""
SCALED = "Scaled"

Told = tuple[str, str, str]
"""(status, reason, message) of one condition."""


@dataclass(frozen=True, slots=True)
class BasePlan:
    status: BaseModelStatus | None = None
    """To be written; None leaves it."""
    children: tuple[Manifest, ...] = ()
    """To be applied."""
    children_hash: str = ""
    remove_deployment_uid: str | None = None
    """A Deployment of a former object of this name: its selector can never fit."""
    scale_to: int | None = None
    unregisters: tuple[Unregister, ...] = ()
    judge: JudgeJob | None = None
    notes: tuple[Note, ...] = ()
    memory: ScaleMemory = field(default_factory=ScaleMemory)
    requeue_at: float | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """What is known of the base's files."""

    facts: SourceFacts | None
    told: Told
    failure: FailureReason | None = None


def plan_base(seen: ObservedBase, now: float, settings: PlanSettings) -> BasePlan:
    """The whole decision."""
    source, job, judge_due = _source(seen, now, settings)
    floor = max((item.warm_replicas for item in seen.adapters), default=0)
    current = seen.base.spec.replicas
    wanted = current if current is not None else initial_replicas(seen.base.spec.scaling, floor)
    decision = decide(
        wanted,
        seen.base.spec.scaling,
        _load(seen, wanted),
        seen.memory,
        floor=floor,
        now=now,
        start_allowance_s=settings.start_allowance_s,
    )
    if _unusable(seen, source):
        decision = ScaleDecision(wanted, "the source cannot be used", ScaleMemory(), None)
    foreign = seen.deployment is not None and seen.deployment.owner_uid != seen.base.meta.uid
    made = _children(seen, source, decision.replicas) if not foreign else ()
    digest = content_hash({"children": list(made)}) if made else ""
    missing = seen.deployment is None and not seen.child_conflict
    due = bool(made) and (digest != seen.applied_hash or seen.apply_again or missing)
    status, counts_at = _status(seen, source, decision, now, settings)
    return BasePlan(
        status=status,
        children=made if due else (),
        children_hash=digest,
        remove_deployment_uid=seen.deployment.meta.uid if foreign and seen.deployment is not None else None,
        scale_to=decision.replicas if decision.replicas != current else None,
        unregisters=_strays(seen, now),
        judge=job,
        notes=_notes(seen, status, decision, current),
        memory=decision.memory,
        requeue_at=min(
            (at for at in (judge_due, decision.recheck_unix_s, counts_at, _stray_due(seen, now)) if at is not None),
            default=None,
        ),
    )


def _source(seen: ObservedBase, now: float, settings: PlanSettings) -> tuple[Source, JudgeJob | None, float | None]:
    """The files, by the operator's own look or by what a runtime reports; an inspection to ask for; when again."""
    base, status = seen.base, seen.base.status
    reported = next(
        (r.believed.base.digest for r in seen.runtimes if r.believed is not None and r.believed.base.digest), None
    )
    if reported is not None:
        told = ("True", Reason.RESOLVED.value, f"{reported}, as loaded by a runtime.")
        return Source(SourceFacts(reported, status.revision), told), None, None
    held = condition(status.conditions, BaseCondition.SOURCE_RESOLVED)
    if base.spec.source.uri.startswith("pvc://"):
        if status.digest is not None and held is not None and held.status == "True":
            known = SourceFacts(status.digest, status.revision)
            return Source(known, (held.status, held.reason, held.message)), None, None
        told = ("Unknown", Reason.AWAITING_RUNTIME.value, "Only a runtime can read this source.")
        return Source(None, told), None, None
    judgement = seen.judgement
    if judgement is None:
        if held is not None and held.status == "True":  # the source is immutable
            facts = SourceFacts(status.digest or "", status.revision)
            return Source(facts, (held.status, held.reason, held.message)), None, None
        job = _job(seen, 1) if seen.judging is None else None
        return Source(None, ("Unknown", Reason.PENDING.value, "The source is being looked at.")), job, None
    outcome = judgement.outcome
    if isinstance(outcome, SourceFacts):
        told = ("True", Reason.RESOLVED.value, f"{outcome.digest or 'Found'}, {outcome.size_bytes or 0} bytes.")
        return Source(outcome, told), None, None
    return _failed(seen, outcome, now, settings)


def _failed(
    seen: ObservedBase, failure: Failure, now: float, settings: PlanSettings
) -> tuple[Source, JudgeJob | None, float | None]:
    judgement = seen.judgement
    assert judgement is not None
    source = Source(None, ("False", failure.reason.value, failure.message), failure.reason)
    if judgement.fingerprint != base_fingerprint(seen):
        return source, _job(seen, 1) if seen.judging is None else None, None
    if not failure.reason.transient:
        return source, None, None
    due = retry_at_unix_s(
        judgement.at_unix_s,
        judgement.attempt,
        judgement.jitter,
        first_s=settings.retry_min_s,
        longest_s=settings.retry_max_s,
        asked_s=failure.retry_after_s,
    )
    if now < due:
        return source, None, due
    return source, _job(seen, judgement.attempt + 1) if seen.judging is None else None, None


def base_fingerprint(seen: ObservedBase) -> str:
    """The source is immutable; only the retry annotation asks again."""
    return f"{seen.base.meta.uid}/{seen.base.meta.retry or ''}"


def _job(seen: ObservedBase, attempt: int) -> JudgeJob:
    base = seen.base
    return JudgeJob(
        key=base.key,
        uid=base.meta.uid,
        fingerprint=base_fingerprint(seen),
        attempt=attempt,
        uri=base.spec.source.uri,
        revision=base.spec.source.revision,
        digest=None,
        base_uid=None,
        max_rank=base.spec.lora.max_rank,
    )


def _unusable(seen: ObservedBase, source: Source) -> bool:
    """Nothing runs and nothing could: no pod is started only to fail."""
    terminal = source.failure is not None and not source.failure.transient
    return terminal and not any(pod.ready for pod in seen.pods)


def _children(seen: ObservedBase, source: Source, replicas: int) -> tuple[Manifest, ...]:
    first_look = source.told[1] == Reason.PENDING and seen.deployment is None
    if seen.profile is None or first_look or _unusable(seen, source):
        return ()
    return tuple(children(seen.base, seen.profile, seen.image, replicas=replicas, token_sha256=seen.token_sha256))


def _load(seen: ObservedBase, wanted: int) -> Load:
    alive = [runtime for runtime in seen.runtimes if not runtime.terminating]
    answers = [runtime.believed for runtime in alive if runtime.believed is not None]
    times = [seen.base.meta.created_unix_s, seen.woken_unix_s]
    for snapshot in answers:
        times += [snapshot.started_unix_s, snapshot.last_request_unix_s or 0.0]
    times += [pod.meta.created_unix_s for pod in seen.pods if not pod.terminating]
    return Load(
        in_flight=sum(snapshot.in_flight + snapshot.waiting for snapshot in answers),
        silent=sum(1 for runtime in alive if runtime.ready and runtime.believed is None),
        ready=min(wanted, sum(1 for runtime in alive if runtime.serving)),
        last_activity_unix_s=max(times),
    )


def _strays(seen: ObservedBase, now: float) -> tuple[Unregister, ...]:
    return tuple(
        Unregister(item.pod_uid, item.pod, item.adapter, item.display, verify=True)
        for item in seen.strays
        if now >= item.since_unix_s + STRAY_GRACE_S
    )


def _stray_due(seen: ObservedBase, now: float) -> float | None:
    return min((at for item in seen.strays if (at := item.since_unix_s + STRAY_GRACE_S) > now), default=None)


# --- status ------------------------------------------------------------------------------


def _status(
    seen: ObservedBase, source: Source, decision: ScaleDecision, now: float, settings: PlanSettings
) -> tuple[BaseModelStatus | None, float | None]:
    """The new status when it says anything new, and when last use is due to be written."""
    base, before = seen.base, seen.base.status
    told = conditions_of(seen, source, decision)
    alive = [pod for pod in seen.pods if not pod.terminating]
    facts = source.facts
    after = BaseModelStatus(
        observed_generation=base.meta.generation,
        conditions=set_conditions(before.conditions, told, generation=base.meta.generation, now=iso(now)),
        replicas=len(alive),
        ready_replicas=sum(1 for runtime in seen.runtimes if runtime.serving),
        selector=selector_text(base),
        revision=facts.revision if facts is not None else before.revision,
        digest=(facts.digest or None) if facts is not None else before.digest,
        state=told[BaseCondition.READY.value][1],
        adapters=counts(seen),
        pods=_pods(seen),
        last_used=before.last_used,
    )
    if _only_pending(seen, source):
        return None, None
    last = max((r.snapshot.last_request_unix_s or 0.0 for r in seen.runtimes if r.snapshot is not None), default=0.0)
    shown = unix(before.last_used) or 0.0
    if int(last) > int(shown):
        if after != before or last >= shown + settings.usage_interval_s or before.last_used is None:
            return after.model_copy(update={"last_used": iso(last)}), None
        return None, shown + settings.usage_interval_s
    return (after if after != before else None), None


def _only_pending(seen: ObservedBase, source: Source) -> bool:
    """A first look that is quick must cost one write, not two."""
    return source.told[1] == Reason.PENDING and not seen.base.status.conditions and not seen.pods


def counts(seen: ObservedBase) -> AdapterCounts:
    return AdapterCounts(
        total=len(seen.adapters),
        ready=sum(1 for item in seen.adapters if item.ready),
        loaded=sum(1 for item in seen.adapters if item.loaded),
        failed=sum(1 for item in seen.adapters if item.failed),
    )


def conditions_of(seen: ObservedBase, source: Source, decision: ScaleDecision) -> Mapping[str, Told]:
    """Condition type → what it says."""
    available = _available(seen, source, decision)
    return {
        BaseCondition.SOURCE_RESOLVED.value: source.told,
        BaseCondition.RUNTIME_AVAILABLE.value: available,
        BaseCondition.READY.value: _ready(seen, source, available),
        BaseCondition.PROGRESSING.value: _progressing(seen, decision),
    }


def _available(seen: ObservedBase, source: Source, decision: ScaleDecision) -> Told:
    """Whether a replica answers now."""
    serving = sum(1 for runtime in seen.runtimes if runtime.serving)
    if serving:
        if serving < decision.replicas:
            told = f"{serving} of {decision.replicas} replicas serve. {_problem(seen)}".strip()
            return ("True", Reason.DEGRADED.value, told)
        return ("True", Reason.AVAILABLE.value, f"{serving} of {decision.replicas} replicas serve.")
    if seen.child_conflict:
        return ("False", Reason.NAME_CONFLICT.value, seen.child_conflict)
    if seen.profile is None:
        return ("False", Reason.PROFILE_NOT_FOUND.value, _no_profile(seen))
    if _unusable(seen, source):
        return ("False", source.told[1], source.told[2])
    if decision.replicas == 0:
        return ("False", Reason.SCALED_TO_ZERO.value, "No replica runs; a request starts one.")
    problem = _problem(seen)
    if problem:
        return ("False", Reason.UNAVAILABLE.value, problem)
    return ("False", Reason.STARTING.value, f"{len(seen.pods)} of {decision.replicas} pods exist, none serves yet.")


def _ready(seen: ObservedBase, source: Source, available: Told) -> Told:
    """Whether a request would be answered: now, or after waking a sleeping base."""
    if available[0] == "True":
        return ("True", Reason.READY.value, available[2])
    if available[1] == Reason.SCALED_TO_ZERO:
        return ("True", Reason.SCALED_TO_ZERO.value, available[2])
    return ("False", available[1], available[2])


def _progressing(seen: ObservedBase, decision: ScaleDecision) -> Told:
    alive = [pod for pod in seen.pods if not pod.terminating]
    ready = sum(1 for pod in alive if pod.ready)
    if len(alive) != decision.replicas or ready < decision.replicas:
        told = f"{decision.replicas} replicas wanted ({decision.reason}), {len(alive)} exist, {ready} are ready."
        return ("True", Reason.STARTING.value, told)
    return ("False", Reason.STABLE.value, "")


def _problem(seen: ObservedBase) -> str:
    for pod in seen.pods:
        if pod.problem and not pod.terminating:
            return f"Pod {pod.meta.name}: {pod.problem}"
    return seen.deployment.problem if seen.deployment is not None else ""


def _no_profile(seen: ObservedBase) -> str:
    return f"spec.runtimeProfile {seen.base.spec.runtime_profile!r} names no profile of the chart's runtimeProfiles."


def _pods(seen: ObservedBase) -> list[PodStatus]:
    """Pods with the boot id they report; terminating ones are no longer counted on."""
    views = {runtime.pod_uid: runtime for runtime in seen.runtimes}
    found = []
    for pod in seen.pods:
        view = views.get(pod.meta.uid)
        now = view.believed if view is not None else None
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


def _notes(
    seen: ObservedBase, status: BaseModelStatus | None, decision: ScaleDecision, current: int | None
) -> tuple[Note, ...]:
    notes = []
    if current is not None and decision.replicas != current:
        notes.append(Note(EventType.NORMAL, SCALED, f"From {current} to {decision.replicas}: {decision.reason}."))
    if status is None:
        return tuple(notes)
    for kind in (BaseCondition.SOURCE_RESOLVED, BaseCondition.READY):
        after = condition(status.conditions, kind)
        before = condition(seen.base.status.conditions, kind)
        bad = after is not None and after.status == "False" and after.reason != Reason.STARTING
        if after is not None and bad and (before is None or before.reason != after.reason):
            notes.append(Note(EventType.WARNING, after.reason, after.message))
    return tuple({note.reason: note for note in notes}.values())
