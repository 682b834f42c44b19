"""Which files stand for an adapter: what judge, rollout and runtimes have said so far. Pure.

Called by `plan_adapter`. A good digest is never given up for one that was not proven: a new source is judged,
then loaded beside the old, and only then takes its place; when it fails, the old one keeps serving.

    recorded verdict, or a fresh judgement, or a question to ask  ->  Verdict
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.common import AdapterCondition, Condition, FailureReason, Reason
from lorapool_api.loraadapter import FailureStatus, LoraAdapterSpec, LoraAdapterStatus
from lorapool_api.placement import Replica, home
from lorapool_api.protocol import AdapterState
from lorapool_operator.clock import iso, unix
from lorapool_operator.decisions.plan import Failure, JudgeJob, Judgement, SourceFacts
from lorapool_operator.retry import retry_at_unix_s
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject
from lorapool_operator.world.observed import ObservedAdapter, PlanSettings

MAX_JUDGED_RANK = 256
"""The judge accepts any rank the API allows; the base's own bound is compared here, so raising it needs no judge."""


@dataclass(frozen=True, slots=True)
class Verdict:
    facts: SourceFacts | None = None
    """The files that requests get, or would get if they were any good; None: none known."""
    uri: str | None = None
    revision: str | None = None
    """Where `facts` came from."""
    ok: bool = False
    """`facts` passed: runtimes may hold and serve them."""
    candidate: SourceFacts | None = None
    """New files that are being brought up beside `facts`."""
    judged: str | None = None
    """Fingerprint of the question that is answered."""
    failure: FailureStatus | None = None
    beside: bool = False
    """The failure is about newer files; `facts` keep serving."""
    pending: bool = False
    """The present question has no answer yet."""

    @property
    def failed(self) -> FailureReason | None:
        return reason_of(self.failure.reason) if self.failure is not None else None

    @property
    def rollout_failed(self) -> bool:
        return self.beside and self.failure is not None and self.failure.retry_at is None


@dataclass(frozen=True, slots=True)
class Found:
    """A verdict, an inspection to ask for, and when time alone changes it."""

    verdict: Verdict
    job: JudgeJob | None = None
    due: float | None = None


def find_verdict(seen: ObservedAdapter, *, may_ask: bool, now: float, settings: PlanSettings) -> Found:
    """`may_ask` False: say what is known, ask nothing (suspended, no base, not permitted)."""
    adapter, base, status = seen.adapter, seen.base, seen.adapter.status
    if base is None:
        return Found(replace(_former(adapter, None), failure=status.failure))
    question = fingerprint(adapter, base)
    asked_before = _attempts(adapter, question)
    fresh = seen.judgement
    if status.judged in _answers(question, base):
        return Found(_settled(seen, base))
    if fresh is not None and fresh.fingerprint == question and fresh.attempt > asked_before:
        return _fresh(seen, base, fresh, settings)
    former = _former(adapter, base)
    if not may_ask:
        return Found(replace(former, failure=status.failure, pending=former.facts is None))
    due = unix(status.failure.retry_at) if status.failure is not None else None
    if asked_before and due is not None and due > now:
        return Found(replace(former, failure=status.failure, beside=former.ok), due=due)
    waiting = replace(former, pending=True)
    if seen.judging is not None and seen.judging.fingerprint == question:
        since = seen.judging.running_since_unix_s
        return Found(waiting, due=None if since is None else since + settings.pending_status_s)
    return Found(waiting, _job(seen, base, question, asked_before + 1))


def fingerprint(adapter: AdapterObject, base: BaseObject) -> str:
    """Of everything the verdict depends on. Starts with the base's uid: other weights, other verdict."""
    source = adapter.spec.source
    parts = [source.uri, source.revision or "", source.digest or "", adapter.meta.retry or ""]
    if by_runtime(adapter, base):
        parts.append(str(base.spec.lora.max_rank))  # the runtime judges the rank itself
    return f"{base.meta.uid}/{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def by_runtime(adapter: AdapterObject, base: BaseObject) -> bool:
    """Whether only a runtime can judge: it alone reads claims, and knows a base that lies on one."""
    return adapter.spec.source.uri.startswith("pvc://") or base.spec.source.uri.startswith("pvc://")


def awaits_runtime(seen: ObservedAdapter) -> bool:
    """Whether the question can only be answered by a runtime and none is up."""
    return (
        seen.base is not None
        and by_runtime(seen.adapter, seen.base)
        and not any(place.runtime.serving for place in seen.places)
    )


def min_replicas(spec: LoraAdapterSpec, base: BaseModelSpec) -> int:
    """On how many replicas it is to stay loaded."""
    wanted = spec.min_replicas if spec.min_replicas is not None else base.adapter_defaults.min_replicas
    return wanted if spec.max_replicas is None else min(wanted, spec.max_replicas)


def targets(seen: ObservedAdapter, k: int) -> list[str]:
    """Its home: the first k of the placement order over the replicas that serve."""
    replicas = [Replica(place.runtime.pod_uid) for place in seen.places if place.runtime.serving]
    return home(seen.adapter.meta.uid, replicas, k)


def reason_of(text: str) -> FailureReason:
    """A failure's reason; one this version does not know counts as a failed load."""
    try:
        return FailureReason(text)
    except ValueError:
        return FailureReason.LOAD_FAILED


def condition(conditions: list[Condition], kind: str) -> Condition | None:
    return next((item for item in conditions if item.type == kind), None)


# --- what is recorded --------------------------------------------------------------------


def _recorded(status: LoraAdapterStatus) -> SourceFacts | None:
    if status.digest is None:
        return None
    return SourceFacts(status.digest, status.revision, status.rank, tuple(status.target_modules), status.size_bytes)


def _former(adapter: AdapterObject, base: BaseObject | None) -> Verdict:
    """What was served before, if that was good on this very base."""
    status = adapter.status
    recorded = _recorded(status)
    if recorded is None or (base is not None and (status.judged or "").partition("/")[0] != base.meta.uid):
        return Verdict(judged=status.judged)
    progressing = condition(status.conditions, AdapterCondition.PROGRESSING)
    beside = progressing is not None and progressing.reason == Reason.ROLLOUT_FAILED
    bad = status.failure is not None and status.failure.retry_at is None and not beside
    if bad:
        return Verdict(judged=status.judged)
    return Verdict(recorded, status.source_uri, status.source_revision, ok=True, judged=status.judged)


def _answers(question: str, base: BaseObject) -> tuple[str, str]:
    """How status spells that a question is answered; the second form holds only under the present bound of rank."""
    return question, f"{question}#{base.spec.lora.max_rank}"


def _attempts(adapter: AdapterObject, question: str) -> int:
    """Failed attempts at this very question that status tells of; it leaves `judged` as it was."""
    status = adapter.status
    if status.failure is None or status.failure.retry_at is None or status.judged == question:
        return 0
    same = status.observed_generation == adapter.meta.generation and status.observed_retry == adapter.meta.retry
    return status.failure.attempts if same else 0


def _settled(seen: ObservedAdapter, base: BaseObject) -> Verdict:
    """Judged before and nothing changed: what runtimes say is all that can be new."""
    adapter, status = seen.adapter, seen.adapter.status
    recorded, source = _recorded(status), adapter.spec.source
    settled = Verdict(recorded, status.source_uri, status.source_revision, judged=status.judged)
    terminal = status.failure if status.failure is not None and status.failure.retry_at is None else None
    progressing = condition(status.conditions, AdapterCondition.PROGRESSING)
    if terminal is not None and progressing is not None and progressing.reason == Reason.ROLLOUT_FAILED:
        return replace(settled, ok=recorded is not None, failure=terminal, beside=True)
    same_source = (status.source_uri, status.source_revision) == (source.uri, source.revision)
    if recorded is None or not same_source:
        return replace(settled, failure=status.failure)
    rank = rank_failure(recorded, base) if not by_runtime(adapter, base) else None
    if rank is not None:
        return replace(settled, failure=rank)
    if terminal is not None and (reason_of(terminal.reason) is not FailureReason.RANK_TOO_HIGH):
        return replace(settled, failure=terminal)
    failure = _runtime_failure(seen, recorded.digest)
    return replace(settled, ok=failure is None or failure.retry_at is not None, failure=failure)


# --- what is new -------------------------------------------------------------------------


def _fresh(seen: ObservedAdapter, base: BaseObject, judgement: Judgement, settings: PlanSettings) -> Found:
    """A judgement that status does not tell of yet."""
    former = _former(seen.adapter, base)
    outcome, source = judgement.outcome, seen.adapter.spec.source
    if isinstance(outcome, Failure):
        failure, due = _failure_status(outcome, judgement, settings)
        # a transient failure leaves the question open
        judged = former.judged if due is not None else judgement.fingerprint
        return Found(replace(former, judged=judged, failure=failure, beside=former.ok), due=due)
    arrived = Verdict(outcome, source.uri, source.revision, ok=True, judged=judgement.fingerprint)
    new = former.facts is None or former.facts.digest != outcome.digest
    rank = rank_failure(outcome, base)
    if rank is not None:
        if former.ok and new:
            judged = f"{judgement.fingerprint}#{base.spec.lora.max_rank}"
            return Found(replace(former, judged=judged, failure=rank, beside=True))
        return Found(replace(arrived, ok=False, failure=rank))
    if not former.ok or not new:
        return Found(arrived)
    return Found(_rollout(seen, former, arrived))


def _rollout(seen: ObservedAdapter, former: Verdict, arrived: Verdict) -> Verdict:
    """Switch once the new files were loaded where they belong, or when no runtime could load them now."""
    assert arrived.facts is not None
    assert seen.base is not None
    k = max(1, min_replicas(seen.adapter.spec, seen.base.spec))
    at = set(targets(seen, k))
    if not at:
        return arrived
    reports = [place.report(arrived.facts.digest) for place in seen.places if place.runtime.pod_uid in at]
    for report in reports:
        detail = report.failure if report is not None and report.state is AdapterState.FAILED else None
        if detail is not None and not reason_of(detail.reason).transient:
            failure = FailureStatus(reason=detail.reason, message=detail.message, attempts=detail.attempts)
            return replace(former, judged=arrived.judged, failure=failure, beside=True)
    if all(report is not None and report.state is AdapterState.LOADED for report in reports):
        return arrived
    return replace(former, candidate=arrived.facts)


def _failure_status(
    outcome: Failure, judgement: Judgement, settings: PlanSettings
) -> tuple[FailureStatus, float | None]:
    due = None
    if outcome.reason.transient:
        due = retry_at_unix_s(
            judgement.at_unix_s,
            judgement.attempt,
            judgement.jitter,
            first_s=settings.retry_min_s,
            longest_s=settings.retry_max_s,
            asked_s=outcome.retry_after_s,
        )
    status = FailureStatus(
        reason=outcome.reason.value,
        message=outcome.message[:1024],
        attempts=judgement.attempt,
        retry_at=iso(due + 0.999) if due is not None else None,
    )
    return status, unix(status.retry_at)


def rank_failure(facts: SourceFacts, base: BaseObject) -> FailureStatus | None:
    bound = base.spec.lora.max_rank
    if facts.rank is None or facts.rank <= bound:
        return None
    return FailureStatus(
        reason=FailureReason.RANK_TOO_HIGH.value,
        message=f"The adapter's rank is {facts.rank}, the base allows {bound}. Train with r <= {bound}, or raise "
        "spec.lora.maxRank of the BaseModel.",
        attempts=1,
    )


def _runtime_failure(seen: ObservedAdapter, digest: str) -> FailureStatus | None:
    """What a runtime says went wrong with these files, unless another one has them loaded."""
    reports = [
        report
        for place in seen.places
        if place.runtime.believed is not None and (report := place.report(digest)) is not None
    ]
    if any(report.state is AdapterState.LOADED for report in reports):
        return None
    for report in reports:
        if report.state is AdapterState.FAILED and report.failure is not None:
            detail = report.failure
            transient = reason_of(detail.reason).transient
            at = detail.retry_at_unix_s if detail.retry_at_unix_s is not None else report.since_unix_s
            return FailureStatus(
                reason=detail.reason,
                message=detail.message,
                attempts=detail.attempts,
                retry_at=iso(at) if transient else None,
            )
    return None


def _job(seen: ObservedAdapter, base: BaseObject, question: str, attempt: int) -> JudgeJob | None:
    """The inspection to ask for; None while only a runtime could make it and none is up."""
    adapter, via = seen.adapter, None
    if by_runtime(adapter, base):
        via = next((place.runtime.pod_uid for place in seen.places if place.runtime.serving), None)
        if via is None:
            return None
    return JudgeJob(
        key=adapter.key,
        uid=adapter.meta.uid,
        fingerprint=question,
        attempt=attempt,
        uri=adapter.spec.source.uri,
        revision=adapter.spec.source.revision,
        digest=adapter.spec.source.digest,
        base_uid=base.meta.uid,
        max_rank=MAX_JUDGED_RANK,
        via_pod_uid=via,
    )
