"""Plans what is to be done about one LoraAdapter.

Adapters with minReplicas are registered and pinned on their preferred replicas, hot adapters are loaded on theirs. All
others are left to the gateways, which register them on demand. Whatever a runtime holds that it should not is
unregistered.

    blocker (suspended, no base, not permitted)  ->  validity  ->  spread  ->  registrations  ->  status
"""

from __future__ import annotations

from dataclasses import replace

from lorapool_api.chat import chat_hash
from lorapool_api.common import AdapterCondition, AdapterKey, Reason, duration_s
from lorapool_api.loraadapter import LoraAdapterStatus, PlacementStatus
from lorapool_api.protocol import AdapterDescriptor, AdapterReport, AdapterState, SourceRef, descriptor_of
from lorapool_operator.decisions import load_writes
from lorapool_operator.decisions.adapter_status import status_of
from lorapool_operator.decisions.blocker import Blocker, base_failure_due, blocker_of
from lorapool_operator.decisions.plan import AdapterPlan, KubeEvent, KubeEventType, PlanSettings, Register, Unregister
from lorapool_operator.decisions.scaling.stopping import takes_over
from lorapool_operator.decisions.spread import SpreadDecision, decide
from lorapool_operator.decisions.validity import RUNTIME_RETRY_S, Validity, decide_validity, reason_of
from lorapool_operator.world.cluster_cache import BaseObject, find_condition
from lorapool_operator.world.observed import ObservedAdapter, SourceFacts, SpreadMemory, max_replicas

DRAIN_QUIET_S = 5.0
"""An old digest is unregistered once it was unused for this long: gateways have noticed the switch by then."""

WARNED = {
    AdapterCondition.READY: (Reason.BASE_NOT_FOUND, Reason.NOT_PERMITTED),
    AdapterCondition.NAME_CONFLICT: (Reason.ALIAS_TAKEN, Reason.NAME_RESERVED),
    AdapterCondition.OUTDATED: (Reason.SOURCE_CHANGED,),
}
"""The reasons of conditions that an event reports. A base that fails posts its own."""

BASE_GRACE_S = 3.0
"""How long to wait for the base of a new adapter, which may have been created together with it."""


def plan_adapter(observed: ObservedAdapter, now: float, settings: PlanSettings) -> AdapterPlan:
    """Returns the whole plan; the same observation, time and settings give the same plan."""
    blocker = blocker_of(observed.adapter, observed.base, unreadable=observed.base_unreadable)
    known = observed
    if blocker is not None and blocker.reason is Reason.NOT_PERMITTED:
        known = replace(
            observed, base=None
        )  # nothing in the status may depend on a base that is not the tenant's to see
    decided = decide_validity(known, may_inspect=blocker is None, now=now, settings=settings)
    validity = decided.validity
    served = blocker is None and observed.base is not None and validity.ok
    unregisters: tuple[Unregister, ...] = ()
    quiet_at: float | None = None
    # without a base there is nothing to unregister: the base's runtimes end with it, or it is only not known yet
    closed = blocker is not None and observed.base is not None and blocker.reason is not Reason.BASE_NOT_FOUND
    if served or closed or (blocker is None and _refused(validity)):
        unregisters, quiet_at = _unregisters(observed, validity, _digests(validity) if served else frozenset(), now)
    spread = _spread(observed, served, now)
    placement = _placement(observed, spread) if served else None
    status, usage_due = status_of(known, blocker, validity, placement, now, settings)
    if status is not None and _too_early(observed, blocker, validity, now, settings):
        status = status if status.replicas != observed.adapter.status.replicas else None
    base_due = _base_due(observed, blocker, now)
    if base_due is not None:
        status = None
    writes = load_writes.decide(
        observed.adapter.status, status, observed.load_writes_until_unix_s, now, settings.load_status_interval_s
    )
    if writes.due_unix_s is not None:
        status = None
    failure_due = base_failure_due(known.base)
    if failure_due is not None and failure_due <= now:
        failure_due = None
    due = (decided.due, quiet_at, usage_due, base_due, spread.recheck_unix_s, failure_due, writes.due_unix_s)
    return AdapterPlan(
        status=status,
        registers=_registers(observed, observed.base, validity, spread.k, now)
        if served and observed.base is not None
        else (),
        unregisters=unregisters,
        inspect=decided.job,
        events=_events(observed.adapter.status, status, validity) if status is not None else (),
        memory=spread.memory,
        load_writes_until_unix_s=writes.until_unix_s,
        requeue_at=min((at for at in due if at is not None), default=None),
    )


def _digests(validity: Validity) -> frozenset[str]:
    return frozenset(facts.digest for facts in (validity.facts, validity.candidate) if facts is not None)


def _base_due(observed: ObservedAdapter, blocker: Blocker | None, now: float) -> float | None:
    """Returns until when a missing base is not reported: two watches deliver a base and an adapter made together.

    A base that exists but does not permit the adapter is reported as late, so that no time tells them apart.
    """
    missing = blocker is not None and blocker.reason in (Reason.BASE_NOT_FOUND, Reason.NOT_PERMITTED)
    if not missing or observed.adapter.status.conditions:
        return None
    due = observed.adapter.meta.created_unix_s + BASE_GRACE_S
    return due if now < due else None


def _refused(validity: Validity) -> bool:
    """True for a terminal failure. An undetermined result is not a refusal."""
    return not validity.ok and validity.failure is not None and validity.failure.retry_at is None


def _too_early(
    observed: ObservedAdapter, blocker: Blocker | None, validity: Validity, now: float, settings: PlanSettings
) -> bool:
    """True while a pending inspection is not reported yet, so that a quick one costs one status write, not two."""
    if blocker is not None or not validity.pending or observed.awaits_runtime:
        return False
    since = observed.running.running_since_unix_s if observed.running is not None else None
    return since is None or now < since + settings.pending_status_s


def _spread(observed: ObservedAdapter, served: bool, now: float) -> SpreadDecision:
    """Decides the number of preferred replicas; leaves it alone while a ready replica does not answer."""
    base, before = observed.base, observed.preferred_replicas
    if base is None or not served:
        return SpreadDecision(1, "", SpreadMemory())
    if observed.silent:
        return SpreadDecision(before, "", observed.spread_memory)
    return decide(
        before,
        observed.requests,
        lowest=max(1, len(observed.pinned_pod_uids)),
        highest=min(observed.serving, max_replicas(observed.adapter.spec, base.spec)),
        target=base.spec.scaling.target_in_flight,
        down_delay_s=duration_s(base.spec.scaling.scale_down_delay),
        memory=observed.spread_memory,
        now=now,
    )


def _placement(observed: ObservedAdapter, spread: SpreadDecision) -> PlacementStatus | None:
    """Returns the placement to publish; None for an adapter with the one preferred replica that every adapter has."""
    before = observed.adapter.status.placement
    if observed.silent and spread.k == observed.preferred_replicas:
        return before
    if not observed.serving or (spread.k == 1 and not observed.pinned_pod_uids):
        return None
    names = {item.runtime.pod_uid: item.runtime.pod for item in observed.replicas}
    why = spread.why or (before.why if before is not None else f"minReplicas is {observed.min_replicas}")
    return PlacementStatus(k=spread.k, replicas=[names[uid] for uid in observed.serving_pod_uids[: spread.k]], why=why)


def _registers(
    observed: ObservedAdapter, base: BaseObject, validity: Validity, k: int, now: float
) -> tuple[Register, ...]:
    """Loads the adapter on its preferred replicas; on others, updates only runtimes that already have it loaded.

    Every runtime that knows the adapter is given what its object says about chats, by which the next request is
    written.
    """
    warm = set(observed.pinned_pod_uids)
    hot = warm | set(observed.serving_pod_uids[:k] if k > 1 else ())
    if validity.facts is not None:
        hot |= takes_over(observed, validity.facts.digest, k, now)
    trial = set(observed.serving_pod_uids[: max(k, observed.min_replicas)] if validity.candidate is not None else ())
    spec = observed.adapter.spec
    source, said = spec.source, chat_hash(spec.chat_template, spec.generation)
    wanted: list[Register] = []
    for replica in observed.replicas if hot or trial else observed.holders:
        snapshot, pod_uid = replica.runtime.current, replica.runtime.pod_uid
        if snapshot is None or not replica.runtime.serving:
            continue
        for facts, uri, revision, pinned, load in (
            (validity.facts, validity.uri, validity.revision, pod_uid in warm, pod_uid in hot),
            (validity.candidate, source.uri, source.revision, False, pod_uid in trial),
        ):
            report = replica.report(facts.digest) if facts is not None else None
            outdated = report is not None and report.chat_hash != said
            if facts is None or not (load or outdated or (report is not None and report.state is AdapterState.LOADED)):
                continue
            descriptor = _descriptor(observed, base, facts, uri or source.uri, revision, pinned=pinned, load=load)
            unloaded = load and not pinned and report is not None and report.state is AdapterState.REGISTERED
            known = observed.registered.get((snapshot.boot_id, facts.digest)) == descriptor
            if report is not None and known and not unloaded:
                continue
            key = AdapterKey(observed.adapter.meta.uid, facts.digest)
            wanted.append(Register(pod_uid, replica.runtime.pod, key, descriptor))
    return tuple(wanted)


def _descriptor(
    observed: ObservedAdapter,
    base: BaseObject,
    facts: SourceFacts,
    uri: str,
    revision: str | None,
    *,
    pinned: bool,
    load: bool,
) -> AdapterDescriptor:
    """Returns the common descriptor with the source of these very files: during a rollout there are two sources."""
    adapter = observed.adapter
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
    observed: ObservedAdapter, validity: Validity, keep: frozenset[str], now: float
) -> tuple[tuple[Unregister, ...], float | None]:
    """Returns what to unregister now, and when to look again at digests that may still be in use after a switch."""
    leave: list[Unregister] = []
    later: list[float] = []
    for replica in observed.holders:
        if replica.runtime.current is None:
            continue
        for report in replica.reports:
            if report.state is AdapterState.DRAINING:
                later.append(now + DRAIN_QUIET_S)  # it is being unloaded or moved between tiers
                continue
            if report.digest in keep:
                since = replica.runtime.local_time(report.since_unix_s)
                if not (_outdated_failure(observed, validity, since, report) or _try_again(report, since, now)):
                    continue
            elif keep:
                quiet_at = replica.runtime.local_time(report.last_used_unix_s) + DRAIN_QUIET_S
                if report.in_flight > 0 or report.waiting > 0 or now < quiet_at:
                    later.append(max(quiet_at, now + 1.0))
                    continue
            key = AdapterKey(report.uid, report.digest)
            leave.append(Unregister(replica.runtime.pod_uid, replica.runtime.pod, key, report.display))
    return tuple(leave), min(later, default=None)


def _outdated_failure(
    observed: ObservedAdapter, validity: Validity, since_unix_s: float, report: AdapterReport
) -> bool:
    """True for a runtime's failure from before a repeated inspection: it must not outlive the new result."""
    result = observed.inspection
    return (
        report.state is AdapterState.FAILED
        and result is not None
        and result.fingerprint == validity.fingerprint != observed.adapter.recorded_fingerprint
        and validity.failure is None
        and since_unix_s < result.at_unix_s
    )


def _try_again(report: AdapterReport, since_unix_s: float, now: float) -> bool:
    """True if a runtime could not find or read the files a while ago; the next request then loads them again."""
    reason = reason_of(report.failure.reason) if report.state is AdapterState.FAILED and report.failure else None
    may_heal = reason is not None and reason.repeated and not reason.transient
    return may_heal and now >= since_unix_s + RUNTIME_RETRY_S


def _events(before: LoraAdapterStatus, after: LoraAdapterStatus, validity: Validity) -> tuple[KubeEvent, ...]:
    """Returns events for what needs attention and for the switch at the end of a rollout."""
    events = []
    if before.digest is not None and after.digest not in (None, before.digest):
        message = f"Now serving {after.digest}; before: {before.digest}."
        events.append(KubeEvent(KubeEventType.NORMAL, "Switched", message))
    failure = after.failure
    if failure is not None and (before.failure is None or before.failure.reason != failure.reason):
        reason = Reason.ROLLOUT_FAILED.value if validity.rollout_failed else failure.reason
        events.append(KubeEvent(KubeEventType.WARNING, reason, failure.message))
    for kind, reasons in WARNED.items():
        now, was = find_condition(after.conditions, kind), find_condition(before.conditions, kind)
        if now is not None and now.reason in reasons and (was is None or was.reason != now.reason):
            events.append(KubeEvent(KubeEventType.WARNING, now.reason, now.message))
    return tuple(events)
