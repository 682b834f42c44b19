"""What is known of a base's files: from runtimes that loaded them, from an inspection, or from the status."""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import BaseCondition, FailureReason, Reason
from lorapool_operator.decisions.plan import ConditionValue, InspectionJob, PlanSettings
from lorapool_operator.decisions.validity import credentials_changed, retry_due, with_hint
from lorapool_operator.world.cluster_cache import find_condition
from lorapool_operator.world.observed import ObservedBase, SourceFacts, SourceFailure


@dataclass(frozen=True, slots=True)
class BaseSource:
    """The state of the base's files: facts if they were found, else why not."""

    facts: SourceFacts | None
    condition: ConditionValue
    failure: FailureReason | None = None


def source_of(
    observed: ObservedBase, now: float, settings: PlanSettings
) -> tuple[BaseSource, InspectionJob | None, float | None]:
    """Returns what is known of the files, an inspection to be started, and when to try a failed one again."""
    reported = next((r.current.base.digest for r in observed.runtimes if r.current and r.current.base.digest), None)
    if reported is not None:
        value = ("True", Reason.RESOLVED.value, f"{reported}, as loaded by a runtime.")
        return BaseSource(SourceFacts(reported, observed.base.status.revision), value), None, None
    if observed.permission.refused:
        reason = FailureReason.SOURCE_NOT_PERMITTED
        return BaseSource(None, ("False", reason.value, observed.permission.refused), reason), None, None
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
    message = with_hint(failure.reason, failure.message)
    source = BaseSource(None, ("False", failure.reason.value, message), failure.reason)
    if result.fingerprint != observed.fingerprint:
        return source, _job(observed, 1), None
    if not failure.reason.repeated:
        return source, None, None
    due = retry_due(failure, result, settings)
    refused = failure.reason is FailureReason.UNAUTHORIZED
    if now < due and not (refused and credentials_changed(result, observed.credentials_unix_s)):
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
        rights=observed.permission.rights,
    )


def unusable(observed: ObservedBase, source: BaseSource) -> bool:
    """True if no replica runs and none could start, so that no pod is created only to fail."""
    terminal = source.failure is not None and not source.failure.transient
    return terminal and not any(pod.ready for pod in observed.pods)


def first_inspection(observed: ObservedBase, source: BaseSource) -> bool:
    return source.condition[1] == Reason.PENDING and observed.workload is None and observed.other_workload is None
