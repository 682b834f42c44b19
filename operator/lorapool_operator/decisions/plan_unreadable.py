"""What is reported of an object that this version cannot parse, such as one with a field of a newer version."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lorapool_api.common import BaseCondition, Reason
from lorapool_api.tuning.states import JobCondition, JobState
from lorapool_operator.clock import iso
from lorapool_operator.decisions.plan import KubeEvent, KubeEventType
from lorapool_operator.world.cluster_cache import UnreadableObject

SHOWN = {BaseCondition.READY.value: "False", BaseCondition.STALLED.value: "True"}
"""Conditions of bases and adapters."""
SHOWN_OF_JOB = {JobCondition.PROGRESSING.value: "False"}
"""Of a FineTuneJob, whose state stays: it says how far the job is, also to the version that can read it."""


@dataclass(frozen=True, slots=True)
class UnreadablePlan:
    """A merge patch of the raw status, which may hold what this version cannot parse either."""

    status: dict[str, Any]
    event: KubeEvent


def plan_unreadable(item: UnreadableObject, now: float) -> UnreadablePlan | None:
    """Returns the patch and the event for a base or an adapter; None if the status says so already."""
    status = {"observedGeneration": _generation(item), "state": Reason.UNREADABLE.value}
    return _plan(item, now, SHOWN, status, (BaseCondition.RECONCILING.value,))


def plan_unreadable_job(item: UnreadableObject, now: float) -> UnreadablePlan | None:
    """Returns the patch and the event for a FineTuneJob; None if it has ended or the status says so already."""
    state = (item.raw.get("status") or {}).get("state")
    if state in tuple(JobState) and JobState(state).ended:
        return None
    return _plan(item, now, SHOWN_OF_JOB, {"observedGeneration": _generation(item)}, ())


def _generation(item: UnreadableObject) -> int:
    return int(item.raw["metadata"].get("generation") or 0)


def _plan(
    item: UnreadableObject, now: float, shown: Mapping[str, str], status: dict[str, Any], dropped: Collection[str]
) -> UnreadablePlan | None:
    generation = _generation(item)
    message = (
        f"This version of the operator cannot read the object: {item.error}. Correct the field, or upgrade the "
        "operator; nothing was changed."
    )
    before = [entry for entry in (item.raw.get("status") or {}).get("conditions") or () if isinstance(entry, dict)]
    wanted = [_condition(kind, value, message[:1024], generation, before, now) for kind, value in shown.items()]
    if all(entry in before for entry in wanted):
        return None
    kept = [entry for entry in before if entry.get("type") not in (*shown, *dropped)]
    return UnreadablePlan(
        {**status, "conditions": [*kept, *wanted]}, KubeEvent(KubeEventType.WARNING, Reason.UNREADABLE.value, message)
    )


def _condition(
    kind: str, status: str, message: str, generation: int, before: list[dict[str, Any]], now: float
) -> dict[str, Any]:
    old = next((entry for entry in before if entry.get("type") == kind), {})
    since = old.get("lastTransitionTime") if old.get("status") == status else None
    return {
        "type": kind,
        "status": status,
        "observedGeneration": generation,
        "lastTransitionTime": since or iso(now),
        "reason": Reason.UNREADABLE.value,
        "message": message,
    }
