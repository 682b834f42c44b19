"""Decides what is to be done about one LoraAdapter. Pure: the same world and `now` give the same plan.

Called by the reconciler. Warm adapters are registered, pinned, on their home replicas; all others are left to
the gateways, which register on demand. Whatever a runtime holds that it should not is taken off again.

    gate (suspended, no base, not permitted)  ->  verdict  ->  placement  ->  status
"""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import AdapterCondition, AdapterKey, Reason
from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, AdapterState, SourceRef, descriptor_of
from lorapool_operator.decisions.adapter_status import status_of
from lorapool_operator.decisions.blocker import Gate, gate_of
from lorapool_operator.decisions.plan import EventType, JudgeJob, Note, Register, SourceFacts, Unregister
from lorapool_operator.decisions.validity import Verdict, awaits_runtime, condition, find_verdict, min_replicas, targets
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.observed import ObservedAdapter, PlanSettings

DRAIN_QUIET_S = 5.0
"""An old digest leaves a runtime once unused for this long: gateways have seen the switch by then."""

BASE_GRACE_S = 3.0
"""The base of a new adapter may be on its way."""


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    status: LoraAdapterStatus | None = None
    """To be written; None leaves it."""
    registers: tuple[Register, ...] = ()
    unregisters: tuple[Unregister, ...] = ()
    judge: JudgeJob | None = None
    notes: tuple[Note, ...] = ()
    requeue_at: float | None = None


def plan_adapter(seen: ObservedAdapter, now: float, settings: PlanSettings) -> AdapterPlan:
    """The whole decision."""
    gate = gate_of(seen.adapter, seen.base)
    found = find_verdict(seen, may_ask=gate is None, now=now, settings=settings)
    verdict = found.verdict
    served = gate is None and seen.base is not None and verdict.ok
    keep = frozenset(facts.digest for facts in (verdict.facts, verdict.candidate) if facts is not None)
    unregisters: tuple[Unregister, ...] = ()
    quiet_at: float | None = None
    # without its base there is nothing to clear: the base's runtimes go with it, or we only have not seen it yet
    closed = gate is not None and gate.reason is not Reason.BASE_NOT_FOUND
    if served or closed or (gate is None and _refused(verdict)):
        unregisters, quiet_at = _unregisters(seen, verdict, keep if served else frozenset(), now)
    status, flush_at = status_of(seen, gate, verdict, now, settings)
    if status is not None and _too_early(seen, gate, verdict, now, settings):
        status = status if status.replicas != seen.adapter.status.replicas else None
    base_due = _base_due(seen, gate, now)
    if base_due is not None:
        status = None
    return AdapterPlan(
        status=status,
        registers=_registers(seen, seen.base, verdict) if served and seen.base is not None else (),
        unregisters=unregisters,
        judge=found.job,
        notes=_notes(seen.adapter.status, status, verdict) if status is not None else (),
        requeue_at=min((at for at in (found.due, quiet_at, flush_at, base_due) if at is not None), default=None),
    )


def _base_due(seen: ObservedAdapter, gate: Gate | None, now: float) -> float | None:
    """Base and adapter applied together come over two watches: a moment is waited before the base is called missing."""
    if gate is None or gate.reason is not Reason.BASE_NOT_FOUND or seen.adapter.status.conditions:
        return None
    due = seen.adapter.meta.created_unix_s + BASE_GRACE_S
    return due if now < due else None


def _refused(verdict: Verdict) -> bool:
    """Known to be bad; what is only not known yet is left where it is."""
    return not verdict.ok and verdict.failure is not None and verdict.failure.retry_at is None


def _too_early(seen: ObservedAdapter, gate: Gate | None, verdict: Verdict, now: float, settings: PlanSettings) -> bool:
    """A judgement that is quick must cost one write, not two."""
    if gate is not None or not verdict.pending or awaits_runtime(seen):
        return False
    since = seen.judging.running_since_unix_s if seen.judging is not None else None
    return since is None or now < since + settings.pending_status_s


def _registers(seen: ObservedAdapter, base: BaseObject, verdict: Verdict) -> tuple[Register, ...]:
    """Kept warm at home; elsewhere only what a runtime already holds is told of changes."""
    k = min_replicas(seen.adapter.spec, base.spec)
    warm = set(targets(seen, k))
    trial = set(targets(seen, max(1, k))) if verdict.candidate is not None else set()
    source = seen.adapter.spec.source
    wanted: list[Register] = []
    for place in seen.places:
        snapshot, at = place.runtime.believed, place.runtime.pod_uid
        if snapshot is None or not place.runtime.serving:
            continue
        for facts, uri, revision, pinned, load in (
            (verdict.facts, verdict.uri, verdict.revision, at in warm, at in warm),
            (verdict.candidate, source.uri, source.revision, False, at in trial),
        ):
            report = place.report(facts.digest) if facts is not None else None
            if facts is None or not (load or (report is not None and report.state is AdapterState.LOADED)):
                continue
            descriptor = _descriptor(seen, base, facts, uri or source.uri, revision, pinned=pinned, load=load)
            if report is not None and seen.sent.get((snapshot.boot_id, facts.digest)) == descriptor:
                continue
            key = AdapterKey(seen.adapter.meta.uid, facts.digest)
            wanted.append(Register(at, place.runtime.pod, key, descriptor))
    return tuple(wanted)


def _descriptor(
    seen: ObservedAdapter,
    base: BaseObject,
    facts: SourceFacts,
    uri: str,
    revision: str | None,
    *,
    pinned: bool,
    load: bool,
) -> AdapterDescriptor:
    """The contract's descriptor, with the source that these very files came from: a rollout has two."""
    adapter = seen.adapter
    made = descriptor_of(
        namespace=adapter.meta.namespace,
        name=adapter.meta.name,
        spec=adapter.spec,
        base=base.spec,
        revision=facts.revision,
        pinned=pinned,
        load=load,
    )
    return made.model_copy(update={"source": SourceRef(uri=uri, revision=facts.revision or revision)})


def _unregisters(
    seen: ObservedAdapter, verdict: Verdict, keep: frozenset[str], now: float
) -> tuple[tuple[Unregister, ...], float | None]:
    """Digests that must leave a runtime; one that may still be in use after a switch gets a moment."""
    leave: list[Unregister] = []
    later: list[float] = []
    for place in seen.places:
        if place.runtime.believed is None:
            continue
        for report in place.reports:
            if report.state is AdapterState.DRAINING:
                later.append(now + DRAIN_QUIET_S)  # on its way out already, or between two tiers
                continue
            if report.digest in keep:
                if not _outdated_failure(seen, verdict, report):
                    continue
            elif keep:
                quiet_at = (report.last_used_unix_s or 0.0) + DRAIN_QUIET_S
                if report.in_flight > 0 or report.waiting > 0 or now < quiet_at:
                    later.append(max(quiet_at, now + 1.0))
                    continue
            key = AdapterKey(report.uid, report.digest)
            leave.append(Unregister(place.runtime.pod_uid, place.runtime.pod, key, report.display))
    return tuple(leave), min(later, default=None)


def _outdated_failure(seen: ObservedAdapter, verdict: Verdict, report: AdapterReport) -> bool:
    """A failure that a runtime remembers from before the judge was asked again must not outlive the new verdict."""
    judgement = seen.judgement
    return (
        report.state is AdapterState.FAILED
        and judgement is not None
        and judgement.fingerprint == verdict.judged != seen.adapter.status.judged
        and verdict.failure is None
        and report.since_unix_s < judgement.at_unix_s
    )


def _notes(before: LoraAdapterStatus, after: LoraAdapterStatus, verdict: Verdict) -> tuple[Note, ...]:
    """Events: only what someone should look at, and the switch of a rollout."""
    notes = []
    if before.digest is not None and after.digest not in (None, before.digest):
        notes.append(Note(EventType.NORMAL, "Switched", f"Now serving {after.digest}; before: {before.digest}."))
    failure = after.failure
    if failure is not None and (before.failure is None or before.failure.reason != failure.reason):
        reason = Reason.ROLLOUT_FAILED.value if verdict.rollout_failed else failure.reason
        notes.append(Note(EventType.WARNING, reason, failure.message))
    ready = condition(after.conditions, AdapterCondition.READY)
    was = condition(before.conditions, AdapterCondition.READY)
    gates = (Reason.BASE_NOT_FOUND, Reason.NOT_PERMITTED)
    if ready is not None and ready.reason in gates and (was is None or was.reason != ready.reason):
        notes.append(Note(EventType.WARNING, ready.reason, ready.message))
    return tuple(notes)
