"""The status of a LoraAdapter, from what was observed.

`Loaded=True` requires that a current snapshot of an existing pod reports this digest on the device. An idle adapter is
Ready with `Loaded=False`, reason Parked. A base that is scaled to zero or starting does not make its adapters unready.
"""

from __future__ import annotations

from lorapool_api.chat import ChatReport
from lorapool_api.common import AdapterCondition, FailureReason, Reason, set_conditions
from lorapool_api.loraadapter import LoraAdapterStatus, PlacementStatus, ReplicaStatus
from lorapool_api.protocol import AdapterState, Tier
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions import usage
from lorapool_operator.decisions.blocker import Blocker, base_failure
from lorapool_operator.decisions.model_names import granted_name, name_conflict
from lorapool_operator.decisions.pins import kept_replicas
from lorapool_operator.decisions.plan import ConditionValue, PlanSettings
from lorapool_operator.decisions.validity import Validity
from lorapool_operator.world.cluster_cache import find_condition
from lorapool_operator.world.observed import AdapterOnReplica, ObservedAdapter, SourceFacts, unchecked

COMPATIBILITY = frozenset(
    {
        FailureReason.INCOMPATIBLE,
        FailureReason.WRONG_BASE,
        FailureReason.RANK_TOO_HIGH,
        FailureReason.NON_FINITE_WEIGHTS,
    }
)
LOADING = frozenset({FailureReason.NO_CAPACITY, FailureReason.DISK_FULL, FailureReason.LOAD_FAILED})

AWAITING: ConditionValue = (
    "Unknown",
    Reason.AWAITING_RUNTIME.value,
    "Only a runtime can read this source; a request starts one.",
)
UNVERIFIED: ConditionValue = (
    "True",
    Reason.UNVERIFIED.value,
    "Only a runtime can read this source; it is checked when a request starts the base.",
)
NOT_CHECKED: ConditionValue = (
    "Unknown",
    Reason.NOT_CHECKED.value,
    "Not checked against the base yet, of which no runtime has run. A request starts one, which checks the adapter.",
)
PENDING: ConditionValue = ("Unknown", Reason.PENDING.value, "The source is being inspected.")


def status_of(
    observed: ObservedAdapter,
    blocker: Blocker | None,
    validity: Validity,
    placement: PlacementStatus | None,
    now: float,
    settings: PlanSettings,
) -> tuple[LoraAdapterStatus | None, float | None]:
    """Returns the new status if it differs, and when counted usage is due to be written."""
    adapter, before, facts = observed.adapter, observed.adapter.status, validity.facts
    replicas = _replicas(observed, facts.digest if facts is not None else None)
    on_device = sum(1 for item in replicas if item.tier == Tier.DEVICE)
    values = conditions_of(observed, blocker, validity, on_device, now)
    after = LoraAdapterStatus(
        observed_generation=adapter.meta.generation,
        conditions=set_conditions(before.conditions, values, generation=adapter.meta.generation, now=iso(now)),
        state=_state(values),
        alias=granted_name(adapter, observed.name_holder) if blocker is None or blocker.keeps_name else None,
        revision=facts.revision if facts is not None else None,
        digest=facts.digest if facts is not None else None,
        source_uri=validity.uri,
        source_revision=validity.revision,
        rank=facts.rank if facts is not None else None,
        target_modules=list(facts.target_modules)[:64] if facts is not None else [],
        size_bytes=facts.size_bytes if facts is not None else None,
        loaded_replicas=on_device,
        loaded=f"{on_device}/{max(observed.min_replicas, on_device, 1)}",
        replicas=replicas,
        placement=placement,
        chat=_chat(observed, facts),
        last_used=before.last_used,
        usage=before.usage,
        failure=validity.failure,
        observed_retry=adapter.meta.retry[:256] if adapter.meta.retry else None,
        judged=validity.fingerprint,
    )
    return _with_usage(observed, after, now, settings)


def conditions_of(
    observed: ObservedAdapter, blocker: Blocker | None, validity: Validity, on_device: int, now: float
) -> dict[str, ConditionValue]:
    """Returns the value of each condition type."""
    resolved, compatible = _source(observed, blocker, validity)
    loaded = _loaded(observed, blocker, validity, on_device)
    ready, progressing = _ready(observed, blocker, validity, loaded, now), _progressing(blocker, validity)
    values = {
        AdapterCondition.RESOLVED.value: resolved,
        AdapterCondition.COMPATIBLE.value: compatible,
        AdapterCondition.LOADED.value: loaded,
        AdapterCondition.READY.value: ready,
        AdapterCondition.PROGRESSING.value: progressing,
    }
    if (conflict := name_conflict(observed.adapter, observed.name_holder)) is not None:
        values[AdapterCondition.NAME_CONFLICT.value] = conflict
    outdated = _outdated(observed, validity)
    if outdated is not None:
        values[AdapterCondition.OUTDATED.value] = outdated
    stalled = _stalled(observed, blocker, validity, ready)
    if stalled is not None:
        values[AdapterCondition.STALLED.value] = ("True", stalled[1], stalled[2])
    elif progressing[0] == "True" or ready[0] == "Unknown":
        values[AdapterCondition.RECONCILING.value] = ("True", *(progressing if ready[0] == "True" else ready)[1:])
    return values


def _with_usage(
    observed: ObservedAdapter, after: LoraAdapterStatus, now: float, settings: PlanSettings
) -> tuple[LoraAdapterStatus | None, float | None]:
    """Adds usage and last use if something else is written anyway, or if they are due."""
    before = observed.adapter.status
    changed = after != before
    reports = [report for replica in observed.holders for report in replica.reports]
    counted = [*(report.usage for report in reports), *observed.lost_usage]
    folded = usage.fold(before.usage, counted, observed.gone_boot_ids, iso(now))
    last = max((item.last_used_unix_s for item in observed.holders), default=0.0)
    newer = int(last) > int(unix(before.last_used) or 0.0)
    if not newer and not usage.differs(before.usage, folded):
        return (after if changed else None), None
    due = (unix(before.usage.as_of) or 0.0) + settings.usage_interval_s if before.usage is not None else now
    if not changed and now < due:
        return None, due
    update = {"usage": folded, "last_used": iso(last) if newer else before.last_used}
    return after.model_copy(update=update), None


def _chat(observed: ObservedAdapter, facts: SourceFacts | None) -> ChatReport | None:
    """Returns how the runtimes write requests for these files; what was observed last while none has read them."""
    before, digest = observed.adapter.status, facts.digest if facts is not None else None
    reports = [replica.report(digest) for replica in observed.holders if replica.runtime.current is not None]
    found = next((report.chat for report in reports if report is not None and report.chat is not None), None)
    same = before.digest == digest and before.observed_generation == observed.adapter.meta.generation
    return found or (before.chat if same else None)


def _replicas(observed: ObservedAdapter, digest: str | None) -> list[ReplicaStatus]:
    """Returns the runtimes that currently report these files on the device or in host memory."""
    found = []
    for replica in observed.holders:
        snapshot, report = replica.runtime.current, replica.report(digest)
        if snapshot is None or report is None:
            continue
        on_device = report.tier is Tier.DEVICE and report.state is AdapterState.LOADED
        if not on_device and report.tier is not Tier.HOST:
            continue
        found.append(
            ReplicaStatus(
                pod=replica.runtime.pod,
                pod_uid=replica.runtime.pod_uid,
                boot_id=snapshot.boot_id,
                digest=report.digest,
                tier=report.tier.value,
                since=iso(report.since_unix_s),
            )
        )
    return sorted(found, key=lambda item: item.pod)[:100]


def _source(
    observed: ObservedAdapter, blocker: Blocker | None, validity: Validity
) -> tuple[ConditionValue, ConditionValue]:
    """Returns Resolved and Compatible for the source that the spec names now."""
    facts, failed = validity.candidate or validity.facts, validity.failed
    message = validity.failure.message if validity.failure is not None else ""
    if validity.pending or (facts is None and failed is None):
        unknown = _not_inspected(observed)
        if blocker is not None and blocker.reason is not Reason.SUSPENDED:
            unknown = ("Unknown", blocker.reason.value, blocker.message)
        return unknown, unknown
    found = f"{facts.digest} of {facts.size_bytes or 0} bytes." if facts is not None else ""
    if failed is not None and failed in COMPATIBILITY:
        return ("True", Reason.RESOLVED.value, found), ("False", failed.value, message)
    if failed is not None and failed not in LOADING:
        return ("False", failed.value, message), ("Unknown", failed.value, "The source could not be used.")
    compatible: ConditionValue = ("True", Reason.COMPATIBLE.value, "")
    if unchecked(validity.fingerprint):
        compatible = NOT_CHECKED
    elif facts is not None and facts.rank is not None:
        compatible = ("True", Reason.COMPATIBLE.value, f"Rank {facts.rank} on {', '.join(facts.target_modules)}.")
    if blocker is not None and blocker.reason is Reason.BASE_NOT_FOUND:
        compatible = ("Unknown", blocker.reason.value, blocker.message)
    return ("True", Reason.RESOLVED.value, found), compatible


def _not_inspected(observed: ObservedAdapter) -> ConditionValue:
    return AWAITING if observed.awaits_runtime else PENDING


def _loaded(observed: ObservedAdapter, blocker: Blocker | None, validity: Validity, on_device: int) -> ConditionValue:
    if on_device:
        return ("True", Reason.LOADED.value, f"On the device of {on_device} replica{'s' if on_device > 1 else ''}.")
    if blocker is not None:
        return ("False", blocker.reason.value, blocker.message)
    failure = validity.failure if not validity.newer_failed else None
    if not validity.ok:
        if failure is not None:
            return ("False", failure.reason, failure.message)
        _, reason, message = _not_inspected(observed)
        return ("False", reason, message)
    digest = validity.facts.digest if validity.facts is not None else None
    if any(_is_loading(replica, digest) for replica in observed.holders):
        return ("False", Reason.LOADING.value, "A runtime is loading it.")
    silent = next((item.runtime.pod for item in observed.replicas if _silent_holder(observed, item)), None)
    if silent is not None:
        return ("Unknown", Reason.UNAVAILABLE.value, f"Runtime {silent} does not answer; it was loaded there.")
    if failure is not None:
        return ("False", failure.reason, failure.message)
    if _lost(observed):
        return ("False", Reason.RUNTIME_RESTARTED.value, "The runtime that held it is gone; the next request loads it.")
    refused = pin_refusal(observed)
    if refused:
        return ("False", Reason.PIN_REFUSED.value, f"{refused} The next request loads it.")
    return ("False", Reason.PARKED.value, "Not on a device; the next request loads it.")


def pin_refusal(observed: ObservedAdapter) -> str:
    """Returns why minReplicas is not honoured as far as the base's owner decides; empty if it is."""
    base, wanted = observed.base, observed.min_replicas
    if base is None or not wanted:
        return ""
    possible, pinned = min(wanted, observed.serving), len(observed.pinned_pod_uids)
    if pinned < possible:
        return (
            f"Pinned on {pinned} of {wanted} replicas: older adapters use what the owner of BaseModel {base.key} "
            "allows (spec.lora.maxPinned, maxPinnedPerNamespace)."
        )
    guest = observed.adapter.meta.namespace != base.meta.namespace
    if kept_replicas(wanted, base.spec, guest=guest) < wanted:
        return (
            f"minReplicas {wanted} is only honoured while BaseModel {base.key} runs: its owner decides in "
            "spec.access.guests (keepAwake, maxReplicas) what adapters of other namespaces keep running."
        )
    return ""


def _is_loading(replica: AdapterOnReplica, digest: str | None) -> bool:
    report = replica.report(digest)
    return report is not None and report.state is AdapterState.LOADING and replica.runtime.current is not None


def _silent_holder(observed: ObservedAdapter, replica: AdapterOnReplica) -> bool:
    """True for a ready pod that had the adapter on its device and does not answer now."""
    runtime = replica.runtime
    if runtime.terminating or runtime.fresh or not runtime.ready:
        return False
    before = observed.adapter.status.replicas
    return any(item.pod_uid == runtime.pod_uid and item.tier == Tier.DEVICE for item in before) or any(
        report.tier is Tier.DEVICE for report in replica.reports
    )


def _lost(observed: ObservedAdapter) -> bool:
    """True if the process that had the adapter on its device is gone and no other one serves yet."""
    base, before = observed.base, observed.adapter.status
    if base is None or base.spec.replicas == 0 or observed.serving:
        return False
    loaded = find_condition(before.conditions, AdapterCondition.LOADED)
    return loaded is not None and (loaded.status != "False" or loaded.reason == Reason.RUNTIME_RESTARTED)


def _ready(
    observed: ObservedAdapter, blocker: Blocker | None, validity: Validity, loaded: ConditionValue, now: float
) -> ConditionValue:
    if blocker is not None:
        return ("False", blocker.reason.value, blocker.message)
    if validity.failure is not None and not validity.newer_failed:
        return ("False", validity.failure.reason, validity.failure.message)
    failed = base_failure(observed.base, now)
    if failed is not None and observed.base is not None:
        message = f"BaseModel {observed.base.key} cannot serve: {failed.reason}: {failed.message}"
        return ("False", Reason.BASE_NOT_READY.value, message)
    if not validity.ok:
        return UNVERIFIED if observed.awaits_runtime else PENDING
    message = ("Loaded." if loaded[0] == "True" else "Loads on the next request.") + _beyond_bound(observed)
    refused = pin_refusal(observed)
    message += f" {refused}" if refused else ""
    known = (Reason.LOADED, Reason.LOADING)
    return ("True", loaded[1] if loaded[1] in known else Reason.PARKED.value, message)


def _beyond_bound(observed: ObservedAdapter) -> str:
    """Returns a note if the adapter wants more replicas than its base may have."""
    most = observed.base.spec.scaling.max_replicas if observed.base is not None else observed.min_replicas
    if observed.min_replicas <= most:
        return ""
    return (
        f" minReplicas is {observed.min_replicas}, but the base has at most {most} replicas: lower it, or raise "
        "spec.scaling.maxReplicas of the BaseModel."
    )


def _outdated(observed: ObservedAdapter, validity: Validity) -> ConditionValue | None:
    """Returns what the last look at the source found; after a restart the status still says it."""
    served, newer, status = validity.facts, validity.newer, observed.adapter.status
    if newer is None or served is None:
        before = find_condition(status.conditions, AdapterCondition.OUTDATED)
        same = served is not None and (status.digest, status.judged) == (served.digest, validity.fingerprint)
        kept = before is not None and same and not validity.checked
        return (before.status, before.reason, before.message) if before is not None and kept else None
    if newer.weights_digest == served.digest:
        message = (
            "The weights are the same, and the source has files for chats too: a chat template, a tokenizer or a "
            f"generation config. They are not in use, because {served.digest} was recorded by a version that did not "
            "read them. To use them, change the annotation lorapool.dev/retry."
        )
        return ("True", Reason.SOURCE_CHANGED.value, message)
    message = (
        f"The source holds {newer.digest} (revision {newer.revision}) now; served is {served.digest} (revision "
        f"{served.revision}). To serve the newer files, name their revision in spec.source, set "
        "spec.source.updatePolicy to Poll, or change the annotation lorapool.dev/retry."
    )
    return ("True", Reason.SOURCE_CHANGED.value, message)


def _stalled(
    observed: ObservedAdapter, blocker: Blocker | None, validity: Validity, ready: ConditionValue
) -> ConditionValue | None:
    """Returns the failure after which nothing changes until a person acts; None while something may."""
    if blocker is not None:
        return ready if blocker.reason is Reason.NOT_PERMITTED else None
    if validity.rollout_failed:
        return _progressing(blocker, validity)
    if validity.failure is not None and validity.failure.retry_at is None:
        return ready
    return ready if observed.base is not None and observed.base.stalled and ready[0] == "False" else None


def _progressing(blocker: Blocker | None, validity: Validity) -> ConditionValue:
    if validity.rollout_failed:
        reason = validity.failure.message if validity.failure is not None else ""
        return ("False", Reason.ROLLOUT_FAILED.value, f"The old files keep being served. {reason}")
    if blocker is None and validity.candidate is not None:
        message = f"{validity.candidate.digest} is being loaded in addition to the old files."
        return ("True", Reason.LOADING.value, message)
    if blocker is None and validity.ok and validity.newer_failed and validity.failure is not None:
        message = f"The changed source cannot be used yet; the old files keep being served. {validity.failure.message}"
        return ("True", validity.failure.reason, message)
    if blocker is None and validity.ok and validity.pending:
        message = "The changed source is being inspected; the old files keep being served."
        return ("True", Reason.PENDING.value, message)
    return ("False", Reason.STABLE.value, "")


def _state(values: dict[str, ConditionValue]) -> str:
    """Returns the most informative reason: RolloutFailed takes precedence over Parked."""
    if values[AdapterCondition.PROGRESSING.value][1] == Reason.ROLLOUT_FAILED:
        return Reason.ROLLOUT_FAILED.value
    ready, loaded = values[AdapterCondition.READY.value], values[AdapterCondition.LOADED.value]
    return loaded[1] if ready[0] == "True" else ready[1]
