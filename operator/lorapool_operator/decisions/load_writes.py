"""How often the load state of an adapter is written to its status.

Adapters that take turns in too few slots are loaded and unloaded every second. The status follows the first changes at
once and later ones at intervals. It never says longer than it is observed that an adapter is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lorapool_api.common import AdapterCondition, Condition, Reason
from lorapool_api.loraadapter import LoraAdapterStatus
from lorapool_api.protocol import Tier
from lorapool_operator.world.cluster_cache import find_condition

BURST = 4
"""Writes that may follow each other at once."""
LOAD_STATES = (Reason.PARKED, Reason.LOADING, Reason.LOADED)
LOAD_FIELDS = ("conditions", "state", "loaded_replicas", "loaded", "replicas")
COUNTED_FIELDS = ("last_used", "usage")
"""Fields with an interval of their own, which are written together with any change."""


@dataclass(frozen=True, slots=True)
class LoadWrites:
    until_unix_s: float
    """When the writes so far are paid for, at one in each interval; 0 for none."""
    due_unix_s: float | None = None
    """Until when the status is not written; None: it is written now, if it differs."""


def decide(
    before: LoraAdapterStatus, after: LoraAdapterStatus | None, until_unix_s: float, now: float, interval_s: float
) -> LoadWrites:
    """Returns whether a status is written now that differs from the present one."""
    if after is None or not _only_load_differs(before, after):
        return LoadWrites(until_unix_s if until_unix_s > now else 0.0)
    paid = max(until_unix_s, now)
    allowed_at = paid - (BURST - 1) * interval_s
    if now < allowed_at and not _ends_loaded(before, after):
        return LoadWrites(until_unix_s, due_unix_s=allowed_at)
    return LoadWrites(paid + interval_s)


def _only_load_differs(before: LoraAdapterStatus, after: LoraAdapterStatus) -> bool:
    """True if the adapter is loading, loaded or unloaded as expected, and nothing else is new."""
    if all(getattr(before, name) == getattr(after, name) for name in LOAD_FIELDS):
        return False
    rest = after.model_copy(update={name: getattr(before, name) for name in (*LOAD_FIELDS, *COUNTED_FIELDS)})
    return rest == before and _without_load(before.conditions) == _without_load(after.conditions) is not None


def _without_load(conditions: Iterable[Condition]) -> list[Condition] | None:
    """Returns the conditions without what loads change; None if the adapter is not ready as usual."""
    rest = [item for item in conditions if item.type not in (AdapterCondition.LOADED, AdapterCondition.READY)]
    ready, loaded = (find_condition(conditions, kind) for kind in (AdapterCondition.READY, AdapterCondition.LOADED))
    usual = ready is not None and ready.status == "True" and loaded is not None and loaded.reason in LOAD_STATES
    return rest if usual else None


def _ends_loaded(before: LoraAdapterStatus, after: LoraAdapterStatus) -> bool:
    """True if the adapter was on more devices than it is."""
    now = {(item.pod_uid, item.tier) for item in after.replicas}
    return any((item.pod_uid, item.tier) not in now for item in before.replicas if item.tier == Tier.DEVICE)
