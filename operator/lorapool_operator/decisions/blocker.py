"""Whether an adapter may be served at all, whatever its files are."""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import Condition, Reason
from lorapool_operator.clock import unix
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject

BASE_FAILURE_S = 30.0
"""A base whose pod restarts may serve again soon: its thousands of adapters report its failure only after this time."""


@dataclass(frozen=True, slots=True)
class Blocker:
    """A reason why an adapter may not be served."""

    reason: Reason
    message: str

    @property
    def keeps_name(self) -> bool:
        """True if the adapter is still one of its base, so that its alias is not free for others."""
        return self.reason not in (Reason.BASE_NOT_FOUND, Reason.NOT_PERMITTED)


def blocker_of(adapter: AdapterObject, base: BaseObject | None, *, unreadable: bool = False) -> Blocker | None:
    """Returns the first reason not to serve the adapter, or None. `unreadable`: the base exists, but is not known."""
    key = adapter.base_key
    if adapter.base_key.namespace != adapter.meta.namespace and (base is None or not permitted(adapter, base)):
        # one answer for both: whether a foreign object exists is not for its guests to find out
        return Blocker(
            Reason.NOT_PERMITTED,
            f"BaseModel {key} does not exist, or does not list namespace {adapter.meta.namespace} in "
            "spec.access.namespaces; ask its owner to add it.",
        )
    if base is None and unreadable:
        return Blocker(Reason.BASE_NOT_READY, f"BaseModel {key} is of a form that this operator cannot parse.")
    if base is None or base.meta.deleting:
        return Blocker(Reason.BASE_NOT_FOUND, f"BaseModel {key} does not exist; create it, or delete this adapter.")
    if adapter.spec.suspend:
        return Blocker(Reason.SUSPENDED, "spec.suspend is true: requests are refused.")
    return None


def permitted(adapter: AdapterObject, base: BaseObject) -> bool:
    """True if the adapter is in the base's own namespace or in one that the base's owner lists."""
    return base.admits(adapter.meta.namespace)


def base_failure(base: BaseObject | None, now: float) -> Condition | None:
    """Returns why the base cannot serve; None while it may still recover soon."""
    due = base_failure_due(base)
    return base.failure if base is not None and due is not None and now >= due else None


def base_failure_due(base: BaseObject | None) -> float | None:
    """Returns from when on the base's failure is the adapters' too; None for a base that did not fail."""
    failed = base.failure if base is not None else None
    if base is None or failed is None:
        return None
    return (unix(failed.last_transition_time) or 0.0) + (0.0 if base.stalled else BASE_FAILURE_S)
