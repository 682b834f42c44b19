"""Which files an adapter is served from: what the status records, the last inspection and the runtimes say.

Valid files are not given up for unproven ones: a new source is inspected, loaded next to the old files, and only then
replaces them. If it fails, the old files keep being served.

    recorded result, or new inspection result, or inspection to be started  ->  Validity
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace

from lorapool_api.common import AdapterCondition, FailureReason, Reason
from lorapool_api.loraadapter import FailureStatus, LoraAdapterStatus, UpdatePolicy
from lorapool_api.protocol import AdapterState, ErrorDetail
from lorapool_operator.clock import iso, retry_at_unix_s, unix
from lorapool_operator.decisions.plan import InspectionJob, PlanSettings
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject, find_condition
from lorapool_operator.world.observed import (
    InspectionResult,
    ObservedAdapter,
    SourceFacts,
    SourceFailure,
    unchecked,
)

TERMINAL_RETRY_MAX_S = 600.0
"""A source that does not exist may still be uploaded, one that refuses access may still grant it: both are inspected at
least this often."""
RUNTIME_RETRY_S = 60.0
"""A runtime that could not find or read the source of a checked adapter may try again after this time."""
RETRY_HINT = "It is checked again when the spec or the annotation lorapool.dev/retry changes."
CREDENTIALS_HINT = (
    "It is checked again at once when the operator's mounted credentials or the annotation lorapool.dev/retry change, "
    "and every 10 minutes at least."
)
CHECK = "#check"
"""Ends the fingerprint of an inspection that looks for newer files at a source that was resolved."""
_IMMUTABLE = re.compile(r"[0-9a-f]{40}|sha256:[0-9a-f]{64}")
MESSAGE_CHARS = 860
"""Longest message of a failure, so that the hint fits the bound of a condition's message."""

MAX_INSPECTED_RANK = 256
"""Inspections accept any rank that the API allows. The base's own bound is compared here, so that raising it needs no
new inspection."""


@dataclass(frozen=True, slots=True)
class Validity:
    """The files that an adapter is served from, and whether they are valid."""

    facts: SourceFacts | None = None
    """The files that requests get, or would get if they were valid; None if none are known."""
    uri: str | None = None
    revision: str | None = None
    """The source of `facts`."""
    ok: bool = False
    """`facts` are valid: runtimes may hold and serve them."""
    candidate: SourceFacts | None = None
    """New files that are being loaded next to `facts`."""
    newer: SourceFacts | None = None
    """Files that the source holds now, which are not served since the spec pins the others."""
    checked: bool = False
    """True if the source was looked at for newer files since this process began."""
    fingerprint: str | None = None
    """The fingerprint that the last final inspection result belongs to."""
    failure: FailureStatus | None = None
    newer_failed: bool = False
    """`failure` concerns newer files; `facts` keep being served."""
    pending: bool = False
    """The present source has not been inspected yet."""

    @property
    def failed(self) -> FailureReason | None:
        return reason_of(self.failure.reason) if self.failure is not None else None

    @property
    def rollout_failed(self) -> bool:
        return self.newer_failed and self.failure is not None and self.failure.retry_at is None


@dataclass(frozen=True, slots=True)
class ValidityDecision:
    """The validity, an inspection to be started, and when the passing of time alone changes the validity."""

    validity: Validity
    job: InspectionJob | None = None
    due: float | None = None


def decide_validity(
    observed: ObservedAdapter, *, may_inspect: bool, now: float, settings: PlanSettings
) -> ValidityDecision:
    """Decides the validity. With `may_inspect` False no inspection is started: the adapter may not be served anyway."""
    adapter, base, fingerprint = observed.adapter, observed.base, observed.fingerprint
    failure = adapter.status.failure
    if base is None or fingerprint is None:
        return ValidityDecision(replace(_last_valid(observed), failure=failure))
    if observed.permission.refused:
        return ValidityDecision(_not_permitted(observed))
    attempts = _failed_attempts(adapter, fingerprint)
    result = observed.inspection
    if adapter.recorded_fingerprint in _recorded_forms(fingerprint, base):
        recorded = _recorded_validity(observed, base)
        if may_inspect and recorded.ok and observed.since_unix_s is not None and _can_change(observed):
            return _watched(observed, base, recorded, observed.since_unix_s, now, settings)
        return ValidityDecision(recorded)
    if result is not None and result.fingerprint == fingerprint and result.attempt > attempts:
        return _new_validity(observed, base, result, settings)
    last = _last_valid(observed)
    if not may_inspect:
        return ValidityDecision(replace(last, failure=failure, pending=last.facts is None))
    due = unix(failure.retry_at) if failure is not None else None
    refused = failure is not None and reason_of(failure.reason) is FailureReason.UNAUTHORIZED
    again = refused and credentials_changed(result, observed.credentials_unix_s)
    if attempts and due is not None and due > now and not again:
        return ValidityDecision(replace(last, failure=failure, newer_failed=last.ok), due=due)
    waiting = replace(last, pending=True)
    if observed.running is not None and observed.running.fingerprint == fingerprint:
        since = observed.running.running_since_unix_s
        return ValidityDecision(waiting, due=None if since is None else since + settings.pending_status_s)
    return ValidityDecision(waiting, _job(observed, base, fingerprint, attempts + 1))


def reason_of(text: str) -> FailureReason:
    """Parses the reason of a failure; one that this version does not know counts as a failed load."""
    try:
        return FailureReason(text)
    except ValueError:
        return FailureReason.LOAD_FAILED


# --- what the status records -------------------------------------------------------------


def _recorded_facts(status: LoraAdapterStatus) -> SourceFacts | None:
    if status.digest is None:
        return None
    return SourceFacts(status.digest, status.revision, status.rank, tuple(status.target_modules), status.size_bytes)


def _not_permitted(observed: ObservedAdapter) -> Validity:
    """The namespace may not use the source. Files of an earlier source that it may still use keep being served."""
    last = _last_valid(observed)
    message = with_hint(FailureReason.SOURCE_NOT_PERMITTED, observed.permission.refused)
    failure = FailureStatus(reason=FailureReason.SOURCE_NOT_PERMITTED.value, message=message, attempts=1)
    return replace(last, fingerprint=last.fingerprint if last.ok else None, failure=failure, newer_failed=last.ok)


def _last_valid(observed: ObservedAdapter) -> Validity:
    """Returns the files that were served until now, if they were valid on this very base and may still be used."""
    status, fingerprint = observed.adapter.status, observed.adapter.recorded_fingerprint
    facts = _recorded_facts(status)
    if facts is None or not observed.record_holds:
        return Validity(fingerprint=fingerprint)
    if status.failure is not None and status.failure.retry_at is None and not _rollout_failed(status):
        return Validity(fingerprint=fingerprint)
    return Validity(facts, status.source_uri, status.source_revision, ok=True, fingerprint=fingerprint)


def _rollout_failed(status: LoraAdapterStatus) -> bool:
    progressing = find_condition(status.conditions, AdapterCondition.PROGRESSING)
    return progressing is not None and progressing.reason == Reason.ROLLOUT_FAILED


def _recorded_forms(fingerprint: str, base: BaseObject) -> tuple[str, str]:
    """Returns the two forms in which the status records a result; the second is void once maxRank changes."""
    return fingerprint, f"{fingerprint}#{base.spec.lora.max_rank}"


def _failed_attempts(adapter: AdapterObject, fingerprint: str) -> int:
    """Returns how many attempts at this inspection failed. A transient failure does not change the fingerprint."""
    status = adapter.status
    if status.failure is None or status.failure.retry_at is None or adapter.recorded_fingerprint == fingerprint:
        return 0
    same = status.observed_generation == adapter.meta.generation and status.observed_retry == adapter.meta.retry
    return status.failure.attempts if same else 0


def _recorded_validity(observed: ObservedAdapter, base: BaseObject) -> Validity:
    """The source was inspected before and has not changed: only the runtimes' reports can be new."""
    status, source = observed.adapter.status, observed.adapter.spec.source
    facts = _recorded_facts(status)
    recorded = Validity(
        facts, status.source_uri, status.source_revision, fingerprint=observed.adapter.recorded_fingerprint
    )
    terminal = status.failure if status.failure is not None and status.failure.retry_at is None else None
    if terminal is not None and _rollout_failed(status):
        return replace(recorded, ok=facts is not None, failure=terminal, newer_failed=True)
    same_source = (status.source_uri, status.source_revision) == (source.uri, source.revision)
    if facts is None or not same_source:
        return replace(recorded, failure=status.failure)
    rank = rank_failure(facts, base) if not observed.runtime_reads_source else None
    if rank is not None:
        return replace(recorded, failure=rank)
    if terminal is not None and reason_of(terminal.reason) is not FailureReason.RANK_TOO_HIGH:
        return replace(recorded, failure=terminal)
    failure = _runtime_failure(observed, facts.digest)
    return replace(recorded, ok=failure is None or failure.retry_at is not None, failure=failure)


# --- whether the source has changed ------------------------------------------------------


def _can_change(observed: ObservedAdapter) -> bool:
    """True if the source can hold other files later, and if it can be read now."""
    source = observed.adapter.spec.source
    revision = source.revision or source.uri.rpartition("@")[2]
    return not (_IMMUTABLE.fullmatch(revision) or observed.awaits_runtime)


def _watched(
    observed: ObservedAdapter, base: BaseObject, recorded: Validity, since: float, now: float, settings: PlanSettings
) -> ValidityDecision:
    """Looks for newer files at intervals, which begin at another time for each adapter."""
    source, fingerprint = observed.adapter.spec.source, f"{observed.fingerprint}{CHECK}"
    polls = source.update_policy is UpdatePolicy.POLL and source.digest is None
    interval_s = settings.source_poll_s if polls else settings.source_check_s
    began = now - (now - zlib.crc32(observed.adapter.meta.uid.encode())) % interval_s
    result = observed.inspection
    known = result is not None and result.fingerprint == fingerprint
    validity = recorded
    if known and result is not None and isinstance(result.outcome, SourceFacts) and recorded.facts is not None:
        newer = result.outcome if result.outcome.digest != recorded.facts.digest else None
        current = replace(recorded, failure=None, newer_failed=False) if polls and recorded.newer_failed else recorded
        if newer is not None:
            validity = _update(observed, base, current, newer) if polls else replace(recorded, newer=newer)
        else:
            validity = current
        validity = replace(validity, checked=True)
    inspected = result is not None and result.fingerprint in (observed.fingerprint, fingerprint)
    fresh = began <= since or (inspected and result is not None and result.at_unix_s >= began)
    if fresh or observed.running is not None:
        return ValidityDecision(validity, due=began + interval_s)
    job = _job(observed, base, fingerprint, 1)
    return ValidityDecision(validity, replace(job, digest=None) if job is not None else None, began + interval_s)


def _update(observed: ObservedAdapter, base: BaseObject, last: Validity, facts: SourceFacts) -> Validity:
    """Replaces the files by newer ones from the same source, unless these do not fit the base."""
    source, rank = observed.adapter.spec.source, rank_failure(facts, base)
    if rank is not None:
        return replace(last, failure=rank, newer_failed=True)
    new = Validity(facts, source.uri, source.revision, ok=True, fingerprint=last.fingerprint)
    return _rollout(observed, last, new, facts)


# --- what is new -------------------------------------------------------------------------


def _new_validity(
    observed: ObservedAdapter, base: BaseObject, result: InspectionResult, settings: PlanSettings
) -> ValidityDecision:
    """Decides by an inspection result that the status does not contain yet."""
    last = _last_valid(observed)
    outcome, source = result.outcome, observed.adapter.spec.source
    if isinstance(outcome, SourceFailure):
        failure, due = _failure_status(outcome, result, settings)
        # after a transient failure the inspection is repeated, so its fingerprint is not recorded
        fingerprint = last.fingerprint if due is not None else result.fingerprint
        same = (last.uri, last.revision) == (source.uri, source.revision)
        if due is None and same and unchecked(last.fingerprint):
            last = replace(last, ok=False)  # these are the files that turn out not to fit
        return ValidityDecision(replace(last, fingerprint=fingerprint, failure=failure, newer_failed=last.ok), due=due)
    new = Validity(outcome, source.uri, source.revision, ok=True, fingerprint=result.fingerprint)
    changed = last.facts is None or last.facts.digest != outcome.digest
    rank = rank_failure(outcome, base)
    if rank is not None:
        if last.ok and changed:
            fingerprint = f"{result.fingerprint}#{base.spec.lora.max_rank}"
            return ValidityDecision(replace(last, fingerprint=fingerprint, failure=rank, newer_failed=True))
        return ValidityDecision(replace(new, ok=False, failure=rank))
    if not last.ok or not changed:
        return ValidityDecision(new)
    return ValidityDecision(_rollout(observed, last, new, outcome))


def _rollout(observed: ObservedAdapter, last: Validity, new: Validity, facts: SourceFacts) -> Validity:
    """Switches once the preferred replicas have loaded the new files, or at once if no replica could load them."""
    preferred = set(observed.serving_pod_uids[: max(observed.preferred_replicas, observed.min_replicas)])
    if not preferred:
        return new
    reports = [replica.report(facts.digest) for replica in observed.replicas if replica.runtime.pod_uid in preferred]
    for report in reports:
        detail = report.failure if report is not None and report.state is AdapterState.FAILED else None
        if detail is not None and not reason_of(detail.reason).transient:
            failure = _runtime_failure_status(detail, retry_at=None)
            return replace(last, fingerprint=new.fingerprint, failure=failure, newer_failed=True)
    if all(report is not None and report.state is AdapterState.LOADED for report in reports):
        return new
    return replace(last, candidate=facts)


def _failure_status(
    outcome: SourceFailure, result: InspectionResult, settings: PlanSettings
) -> tuple[FailureStatus, float | None]:
    """Returns the failure as the status shows it and, for a transient one, when to try again."""
    due = retry_due(outcome, result, settings) if outcome.reason.repeated else None
    status = FailureStatus(
        reason=outcome.reason.value,
        message=with_hint(outcome.reason, outcome.message),
        attempts=result.attempt,
        retry_at=iso(due + 0.999) if due is not None else None,
    )
    return status, unix(status.retry_at)


def retry_due(outcome: SourceFailure, result: InspectionResult, settings: PlanSettings) -> float:
    """Returns when to inspect a source again that failed."""
    return retry_at_unix_s(
        result.at_unix_s,
        result.attempt,
        result.jitter,
        first_s=settings.retry_min_s,
        longest_s=settings.retry_max_s if outcome.reason.transient else TERMINAL_RETRY_MAX_S,
        asked_s=outcome.retry_after_s,
    )


def credentials_changed(result: InspectionResult | None, changed_unix_s: float) -> bool:
    """True if the credentials of sources changed after the last inspection had begun."""
    return changed_unix_s > (result.began_unix_s if result is not None else 0.0)


def with_hint(reason: FailureReason, message: str) -> str:
    """Returns the message of a failure with what makes the operator check again, unless it shows when it does."""
    if reason is FailureReason.SOURCE_NOT_PERMITTED:
        return message[:1024]
    hint = CREDENTIALS_HINT if reason is FailureReason.UNAUTHORIZED else "" if reason.repeated else RETRY_HINT
    return message[:1024] if not hint or hint in message else f"{message[:MESSAGE_CHARS]} {hint}"


def rank_failure(facts: SourceFacts, base: BaseObject) -> FailureStatus | None:
    """Returns the failure of an adapter whose rank exceeds the base's bound, or None."""
    bound = base.spec.lora.max_rank
    if facts.rank is None or facts.rank <= bound:
        return None
    return FailureStatus(
        reason=FailureReason.RANK_TOO_HIGH.value,
        message=f"The adapter's rank is {facts.rank}, the base allows {bound}. Train with r <= {bound}, or raise "
        "spec.lora.maxRank of the BaseModel.",
        attempts=1,
    )


def _runtime_failure(observed: ObservedAdapter, digest: str) -> FailureStatus | None:
    """Returns the failure that a runtime reports for these files, unless another runtime has them loaded."""
    reports = [
        report
        for replica in observed.holders
        if replica.runtime.current is not None and (report := replica.report(digest)) is not None
    ]
    if any(report.state is AdapterState.LOADED for report in reports):
        return None
    for report in reports:
        if report.state is AdapterState.FAILED and report.failure is not None:
            detail = report.failure
            repeated = reason_of(detail.reason).repeated
            at = detail.retry_at_unix_s
            if at is None:
                at = report.since_unix_s + (0.0 if reason_of(detail.reason).transient else RUNTIME_RETRY_S)
            return _runtime_failure_status(detail, retry_at=iso(at) if repeated else None)
    return None


def _runtime_failure_status(detail: ErrorDetail, *, retry_at: str | None) -> FailureStatus:
    message = with_hint(reason_of(detail.reason), detail.message)
    return FailureStatus(reason=detail.reason, message=message, attempts=detail.attempts, retry_at=retry_at)


def _job(observed: ObservedAdapter, base: BaseObject, fingerprint: str, attempt: int) -> InspectionJob | None:
    """Returns the inspection to be started; None while only a runtime could do it and none serves."""
    adapter, via = observed.adapter, None
    if observed.awaits_runtime:
        return None
    if observed.runtime_reads_source:
        via = next(item.runtime.pod_uid for item in observed.replicas if item.runtime.serving)
    return InspectionJob(
        key=adapter.key,
        uid=adapter.meta.uid,
        fingerprint=fingerprint,
        attempt=attempt,
        uri=adapter.spec.source.uri,
        revision=adapter.spec.source.revision,
        digest=adapter.spec.source.digest,
        base_uid=base.meta.uid,
        max_rank=MAX_INSPECTED_RANK,
        via_pod_uid=via,
        rights=observed.permission.rights,
    )
