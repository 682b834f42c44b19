"""What is reported of an object that this version cannot parse, such as one with a field of a newer version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorapool_api.common import BaseCondition, Reason
from lorapool_operator.clock import iso
from lorapool_operator.decisions.plan import KubeEvent, KubeEventType
from lorapool_operator.world.cluster_cache import UnreadableObject

SHOWN = (BaseCondition.READY.value, BaseCondition.STALLED.value)


@dataclass(frozen=True, slots=True)
class UnreadablePlan:
    """A merge patch of the raw status, which may hold what this version cannot parse either."""

    status: dict[str, Any]
    event: KubeEvent


def plan_unreadable(item: UnreadableObject, now: float) -> UnreadablePlan | None:
    """Returns the patch and the event; None if the status says so already."""
    generation = int(item.raw["metadata"].get("generation") or 0)
    message = (
        f"This version of the operator cannot read the object: {item.error}. Correct the field, or upgrade the "
        "operator; nothing was changed."
    )
    before = [entry for entry in (item.raw.get("status") or {}).get("conditions") or () if isinstance(entry, dict)]
    wanted = [_condition(kind, message[:1024], generation, before, now) for kind in SHOWN]
    if all(entry in before for entry in wanted):
        return None
    kept = [entry for entry in before if entry.get("type") not in (*SHOWN, BaseCondition.RECONCILING)]
    status = {
        "observedGeneration": generation,
        "state": Reason.UNREADABLE.value,
        "conditions": [*kept, *wanted],
    }
    return UnreadablePlan(status, KubeEvent(KubeEventType.WARNING, Reason.UNREADABLE.value, message))


def _condition(kind: str, message: str, generation: int, before: list[dict[str, Any]], now: float) -> dict[str, Any]:
    status = "False" if kind == BaseCondition.READY else "True"
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
