"""Whether an adapter may be served at all, whatever its files are."""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import Reason
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject


@dataclass(frozen=True, slots=True)
class Blocker:
    """A reason why an adapter may not be served."""

    reason: Reason
    message: str


def blocker_of(adapter: AdapterObject, base: BaseObject | None, *, unreadable: bool = False) -> Blocker | None:
    """Returns the first reason not to serve the adapter, or None. `unreadable`: the base exists, but is not known."""
    key = adapter.base_key
    if base is None and unreadable:
        return Blocker(Reason.BASE_NOT_READY, f"BaseModel {key} is of a form that this operator cannot parse.")
    if base is None or base.meta.deleting:
        return Blocker(Reason.BASE_NOT_FOUND, f"BaseModel {key} does not exist; create it, or delete this adapter.")
    if not permitted(adapter, base):
        return Blocker(
            Reason.NOT_PERMITTED,
            f"BaseModel {key} does not list namespace {adapter.meta.namespace} in spec.access.namespaces; "
            "ask its owner to add it.",
        )
    if adapter.spec.suspend:
        return Blocker(Reason.SUSPENDED, "spec.suspend is true: requests are refused.")
    return None


def permitted(adapter: AdapterObject, base: BaseObject) -> bool:
    """True if the adapter is in the base's own namespace or in one that the base's owner lists."""
    return adapter.meta.namespace == base.meta.namespace or adapter.meta.namespace in base.spec.access.namespaces
