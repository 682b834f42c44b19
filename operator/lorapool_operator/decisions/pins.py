"""Which adapters may be pinned on which replicas, within the bounds of the base's owner.

A pinned adapter (minReplicas above 0) takes a slot that no other adapter can use. The owner bounds the pinned adapters
of one replica, and those of one namespace among them; older adapters come first. Adapters of other namespaces raise or
keep the number of replicas only as far as `access.guests` allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorapool_api.basemodel import BaseModelSpec
from lorapool_api.placement import Replica, placement_order


@dataclass(frozen=True, slots=True, order=True)
class PinWanted:
    """An adapter with minReplicas above 0. Sorts by age."""

    created_unix_s: float
    uid: str
    namespace: str
    replicas: int


def allowed_pins(
    wanted: Iterable[PinWanted], pod_uids: Iterable[str], spec: BaseModelSpec
) -> Mapping[str, frozenset[str]]:
    """Returns, by adapter uid, the replicas among its preferred ones on which it may be pinned.

    Of too many, the first ones of `wanted` are pinned.
    """
    replicas = [Replica(uid) for uid in pod_uids]
    total: Counter[str] = Counter()
    of_namespace: Counter[tuple[str, str]] = Counter()
    found: dict[str, frozenset[str]] = {}
    bound, each = max_pinned(spec), spec.lora.max_pinned_per_namespace
    for pin in wanted:
        allowed = []
        for pod in placement_order(pin.uid, replicas)[: pin.replicas]:
            own = (pin.namespace, pod)
            if total[pod] < bound and (each is None or of_namespace[own] < each):
                total[pod] += 1
                of_namespace[own] += 1
                allowed.append(pod)
        found[pin.uid] = frozenset(allowed)
    return found


def max_pinned(spec: BaseModelSpec) -> int:
    """Returns how many slots of one replica pinned adapters may take: by default half of them, but at least one."""
    return spec.lora.max_pinned if spec.lora.max_pinned is not None else max(1, spec.lora.slots // 2)


def kept_replicas(min_replicas: int, spec: BaseModelSpec, *, guest: bool) -> int:
    """Returns how many replicas of the base an adapter keeps running."""
    guests = spec.access.guests
    if not guest:
        return min_replicas
    return min(min_replicas, guests.max_replicas) if guests.keep_awake else 0
