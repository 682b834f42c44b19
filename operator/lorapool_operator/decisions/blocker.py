"""Whether an adapter may be served at all, whatever its files are. Pure; looked at on every reconcile."""

from __future__ import annotations

from dataclasses import dataclass

from lorapool_api.common import Reason
from lorapool_operator.world.cluster_cache import AdapterObject, BaseObject


@dataclass(frozen=True, slots=True)
class Gate:
    """Why not."""

    reason: Reason
    message: str


def gate_of(adapter: AdapterObject, base: BaseObject | None) -> Gate | None:
    """The first reason not to serve it; None when there is none."""
    key = adapter.base_key
    if base is None or base.meta.deleting:
        return Gate(Reason.BASE_NOT_FOUND, f"BaseModel {key} does not exist; create it, or delete this adapter.")
    if not permitted(adapter, base):
        return Gate(
            Reason.NOT_PERMITTED,
            f"BaseModel {key} does not list namespace {adapter.meta.namespace} in spec.access.namespaces; "
            "ask its owner to.",
        )
    if adapter.spec.suspend:
        return Gate(Reason.SUSPENDED, "spec.suspend is true: requests are refused.")
    return None


def permitted(adapter: AdapterObject, base: BaseObject) -> bool:
    """Own namespace, or listed by the base's owner."""
    return adapter.meta.namespace == base.meta.namespace or adapter.meta.namespace in base.spec.access.namespaces
