"""Says in a LoraAdapter's status what was seen. Pure; called by `plan_adapter`.

`Loaded=True` needs a believed snapshot of an existing pod that reports this digest on the device. An idle
adapter is Ready with `Loaded=False reason=Parked`. A base that sleeps or starts is no fault of its adapters.
"""

from __future__ import annotations

from lorapool_api.common import AdapterCondition, BaseCondition, FailureReason, Reason, set_conditions
from lorapool_api.loraadapter import LoraAdapterStatus, ReplicaStatus
from lorapool_api.protocol import AdapterState, Tier
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions import usage
from lorapool_operator.decisions.blocker import Gate
from lorapool_operator.decisions.plan import AdapterAt
from lorapool_operator.decisions.validity import Verdict, awaits_runtime, condition, min_replicas, reason_of
from lorapool_operator.world.cluster_cache import BaseObject
from lorapool_operator.world.observed import ObservedAdapter, PlanSettings

COMPATIBILITY = frozenset(
    {
        FailureReason.INCOMPATIBLE,
        FailureReason.WRONG_BASE,
        FailureReason.RANK_TOO_HIGH,
        FailureReason.NON_FINITE_WEIGHTS,
    }
)
LOADING = frozenset({FailureReason.NO_CAPACITY, FailureReason.DISK_FULL, FailureReason.LOAD_FAILED})

Told = tuple[str, str, str]
"""(status, reason, message) of one condition."""

AWAITING: Told = ("Unknown", Reason.AWAITING_RUNTIME.value, "Only a runtime can read this source; a request wakes one.")
PENDING: Told = ("Unknown", Reason.PENDING.value, "The source is being looked at.")


def status_of(
    seen: ObservedAdapter, gate: Gate | None, verdict: Verdict, now: float, settings: PlanSettings
) -> tuple[LoraAdapterStatus | None, float | None]:
    """The new status when it says anything new, and when use that was counted is due to be written."""
    adapter, before, facts = seen.adapter, seen.adapter.status, verdict.facts
    replicas = _replicas(seen, facts.digest if facts is not None else None)
    on_device = sum(1 for item in replicas if item.tier == Tier.DEVICE)
    told = conditions_of(seen, gate, verdict, on_device)
    warm = min_replicas(adapter.spec, seen.base.spec) if seen.base is not None else 0
    after = LoraAdapterStatus(
        observed_generation=adapter.meta.generation,
        conditions=set_conditions(before.conditions, told, generation=adapter.meta.generation, now=iso(now)),
        state=_state(told),
        revision=facts.revision if facts is not None else None,
        digest=facts.digest if facts is not None else None,
        source_uri=verdict.uri,
        source_revision=verdict.revision,
        rank=facts.rank if facts is not None else None,
        target_modules=list(facts.target_modules)[:64] if facts is not None else [],
        size_bytes=facts.size_bytes if facts is not None else None,
        loaded_replicas=on_device,
        loaded=f"{on_device}/{max(warm, on_device, 1)}",
        replicas=replicas,
        last_used=before.last_used,
        usage=before.usage,
        failure=verdict.failure,
        observed_retry=adapter.meta.retry[:256] if adapter.meta.retry else None,
        judged=verdict.judged,
    )
    return _with_use(seen, after, now, settings)


def conditions_of(seen: ObservedAdapter, gate: Gate | None, verdict: Verdict, on_device: int) -> dict[str, Told]:
    """Condition type → what it says."""
    resolved, compatible = _source(seen, gate, verdict)
    loaded = _loaded(seen, gate, verdict, on_device)
    return {
        AdapterCondition.RESOLVED.value: resolved,
        AdapterCondition.COMPATIBLE.value: compatible,
        AdapterCondition.LOADED.value: loaded,
        AdapterCondition.READY.value: _ready(seen, gate, verdict, loaded),
        AdapterCondition.PROGRESSING.value: _progressing(gate, verdict),
    }


def _with_use(
    seen: ObservedAdapter, after: LoraAdapterStatus, now: float, settings: PlanSettings
) -> tuple[LoraAdapterStatus | None, float | None]:
    """Adds usage and last use when something else is written anyway, or when their time has come."""
    before = seen.adapter.status
    changed = after != before
    reports = [report for place in seen.places for report in place.reports]
    counted = [*(report.usage for report in reports), *seen.lost_usage]
    folded = usage.fold(before.usage, counted, seen.gone_boots, iso(now))
    last = max((report.last_used_unix_s or 0.0 for report in reports), default=0.0)
    newer = int(last) > int(unix(before.last_used) or 0.0)
    if not newer and not usage.differs(before.usage, folded):
        return (after if changed else None), None
    due = (unix(before.usage.as_of) or 0.0) + settings.usage_interval_s if before.usage is not None else now
    if not changed and now < due:
        return None, due
    use = {"usage": folded, "last_used": iso(last) if newer else before.last_used}
    return after.model_copy(update=use), None


def _replicas(seen: ObservedAdapter, digest: str | None) -> list[ReplicaStatus]:
    """Where believed runtimes report these files on the device, or one copy away from it."""
    found = []
    for place in seen.places:
        snapshot, report = place.runtime.believed, place.report(digest)
        if snapshot is None or report is None:
            continue
        on_device = report.tier is Tier.DEVICE and report.state is AdapterState.LOADED
        if not on_device and report.tier is not Tier.HOST:
            continue
        found.append(
            ReplicaStatus(
                pod=place.runtime.pod,
                pod_uid=place.runtime.pod_uid,
                boot_id=snapshot.boot_id,
                digest=report.digest,
                tier=report.tier.value,
                since=iso(report.since_unix_s),
            )
        )
    return sorted(found, key=lambda item: item.pod)[:100]


def _source(seen: ObservedAdapter, gate: Gate | None, verdict: Verdict) -> tuple[Told, Told]:
    """Resolved and Compatible, of what the spec asks for now."""
    facts, failed = verdict.candidate or verdict.facts, verdict.failed
    message = verdict.failure.message if verdict.failure is not None else ""
    if verdict.pending or (facts is None and failed is None):
        unknown = AWAITING if awaits_runtime(seen) else PENDING
        if gate is not None and gate.reason is not Reason.SUSPENDED:
            unknown = ("Unknown", gate.reason.value, gate.message)
        return unknown, unknown
    found = f"{facts.digest} of {facts.size_bytes or 0} bytes." if facts is not None else ""
    if failed is not None and failed in COMPATIBILITY:
        return ("True", Reason.RESOLVED.value, found), ("False", failed.value, message)
    if failed is not None and failed not in LOADING:
        return ("False", failed.value, message), ("Unknown", failed.value, "The source could not be used.")
    compatible: Told = ("True", Reason.COMPATIBLE.value, "")
    if facts is not None and facts.rank is not None:
        compatible = ("True", Reason.COMPATIBLE.value, f"Rank {facts.rank} on {', '.join(facts.target_modules)}.")
    if gate is not None and gate.reason is Reason.BASE_NOT_FOUND:
        compatible = ("Unknown", gate.reason.value, gate.message)
    return ("True", Reason.RESOLVED.value, found), compatible


def _loaded(seen: ObservedAdapter, gate: Gate | None, verdict: Verdict, on_device: int) -> Told:
    if on_device:
        return ("True", Reason.LOADED.value, f"On the device of {on_device} replica{'s' if on_device > 1 else ''}.")
    if gate is not None:
        return ("False", gate.reason.value, gate.message)
    failure = verdict.failure if not verdict.beside else None
    if not verdict.ok:
        if failure is not None:
            return ("False", failure.reason, failure.message)
        waiting = AWAITING if awaits_runtime(seen) else PENDING
        return ("False", waiting[1], waiting[2])
    reports = [(place, place.report(verdict.facts.digest if verdict.facts else None)) for place in seen.places]
    if any(r is not None and r.state is AdapterState.LOADING and p.runtime.believed is not None for p, r in reports):
        return ("False", Reason.LOADING.value, "A runtime is loading it.")
    silent = next((place.runtime.pod for place in seen.places if _silent_holder(seen, place)), None)
    if silent is not None:
        return ("Unknown", Reason.UNAVAILABLE.value, f"Runtime {silent} does not answer; it was loaded there.")
    if failure is not None:
        return ("False", failure.reason, failure.message)
    if _lost(seen):
        return ("False", Reason.RUNTIME_RESTARTED.value, "The runtime that held it is gone; the next request loads it.")
    return ("False", Reason.PARKED.value, "Not on a device; the next request loads it.")


def _silent_holder(seen: ObservedAdapter, place: AdapterAt) -> bool:
    """A pod that exists, had it on the device, and cannot be asked whether it still has."""
    runtime = place.runtime
    if runtime.terminating or runtime.fresh or not runtime.ready:
        return False
    before = seen.adapter.status.replicas
    return any(item.pod_uid == runtime.pod_uid and item.tier == Tier.DEVICE for item in before) or any(
        report.tier is Tier.DEVICE for report in place.reports
    )


def _lost(seen: ObservedAdapter) -> bool:
    """Whether it was on the device of a process that is gone, and no other one serves yet."""
    base, before = seen.base, seen.adapter.status
    if base is None or base.spec.replicas == 0 or any(place.runtime.serving for place in seen.places):
        return False
    held = condition(before.conditions, AdapterCondition.LOADED)
    return held is not None and (held.status != "False" or held.reason == Reason.RUNTIME_RESTARTED)


def _ready(seen: ObservedAdapter, gate: Gate | None, verdict: Verdict, loaded: Told) -> Told:
    if gate is not None:
        return ("False", gate.reason.value, gate.message)
    if verdict.failure is not None and not verdict.beside:
        return ("False", verdict.failure.reason, verdict.failure.message)
    if not verdict.ok:
        return AWAITING if awaits_runtime(seen) else PENDING
    refused = _base_refuses(seen.base)
    if refused:
        return ("False", Reason.BASE_NOT_READY.value, refused)
    message = "Loaded." if loaded[0] == "True" else "Loads on the next request."
    if seen.alias_holder is not None:
        message += f" The alias {seen.adapter.spec.alias} belongs to {seen.alias_holder}, which is older."
    known = (Reason.LOADED, Reason.LOADING)
    return ("True", loaded[1] if loaded[1] in known else Reason.PARKED.value, message)


def _base_refuses(base: BaseObject | None) -> str:
    """Only what no request could cure: a base that sleeps or starts is no fault of the adapter."""
    resolved = condition(base.status.conditions, BaseCondition.SOURCE_RESOLVED) if base is not None else None
    if base is None or resolved is None or resolved.status != "False" or reason_of(resolved.reason).transient:
        return ""
    return f"The source of BaseModel {base.key} cannot be used: {resolved.message}"


def _progressing(gate: Gate | None, verdict: Verdict) -> Told:
    if verdict.rollout_failed:
        told = verdict.failure.message if verdict.failure is not None else ""
        return ("False", Reason.ROLLOUT_FAILED.value, f"The former files keep serving. {told}")
    if gate is None and verdict.candidate is not None:
        return ("True", Reason.LOADING.value, f"{verdict.candidate.digest} is being loaded beside the former files.")
    if gate is None and verdict.ok and (verdict.pending or verdict.beside):
        return ("True", Reason.PENDING.value, "The changed source is being looked at; the former files keep serving.")
    return ("False", Reason.STABLE.value, "")


def _state(told: dict[str, Told]) -> str:
    """The most telling reason: a rollout that failed is worth more than Parked."""
    if told[AdapterCondition.PROGRESSING.value][1] == Reason.ROLLOUT_FAILED:
        return Reason.ROLLOUT_FAILED.value
    ready, loaded = told[AdapterCondition.READY.value], told[AdapterCondition.LOADED.value]
    return loaded[1] if ready[0] == "True" else ready[1]
