"""The order in which the replicas of a base are tried for one target. Pure.

Each adapter has a number of preferred replicas, the first ones of its placement order, which the operator and every
gateway compute identically. Those of them that have the adapter loaded share its requests: the least busy one comes
first. Other replicas that have it loaded follow, then the rest in placement order, so that an adapter is loaded on few
replicas and no request waits for a load while it could be answered. Replicas that do not answer come last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from lorapool_api import placement
from lorapool_gateway.routing.routes import RuntimeReplica, Target


def candidates(
    target: Target,
    replicas: Iterable[RuntimeReplica],
    in_flight: Mapping[str, int],
    ejected: Collection[str] = frozenset(),
) -> list[RuntimeReplica]:
    """The usable replicas, best first. `in_flight`: this gateway's own requests by pod uid; `ejected`: uids of pods."""
    usable = [replica for replica in replicas if replica.usable]
    if len(usable) < 2:
        return usable

    def load(replica: RuntimeReplica) -> int:
        reported = replica.state.in_flight if replica.state is not None else 0
        return max(reported, in_flight.get(replica.endpoint.pod_uid, 0))

    def is_suspect(replica: RuntimeReplica) -> bool:
        return replica.poll_failed or replica.endpoint.pod_uid in ejected

    if target.adapter is None:
        return sorted(usable, key=lambda item: (is_suspect(item), load(item), item.endpoint.pod_uid))
    rank = _ranks(target.adapter.uid, tuple(replica.endpoint.pod_uid for replica in usable))

    preferred = target.adapter.preferred_replicas

    def preference(replica: RuntimeReplica) -> tuple[bool, bool, bool, int, int]:
        loaded, position = is_loaded(target, replica), rank[replica.endpoint.pod_uid]
        return is_suspect(replica), not loaded, position >= preferred, load(replica) if loaded else 0, position

    return sorted(usable, key=preference)


@lru_cache(maxsize=2048)  # with 100 replicas the order costs more than all else that the gateway does for a request
def _ranks(adapter_uid: str, pod_uids: tuple[str, ...]) -> Mapping[str, int]:
    order = placement.placement_order(adapter_uid, map(placement.Replica, pod_uids))
    return {pod_uid: position for position, pod_uid in enumerate(order)}


def is_loaded(target: Target, replica: RuntimeReplica) -> bool:
    """Whether this replica answers the target without loading anything first."""
    if target.key is None:
        return True
    return replica.state is not None and tuple(target.key) in replica.state.loaded
