"""The order in which the replicas of a base are tried for one target. Pure.

Replicas that have the adapter loaded come first, the least busy one ahead of the others. The rest follow in placement
order, which the operator and every gateway compute identically, so that an adapter is loaded on few replicas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lorapool_api import placement
from lorapool_gateway.routing.routes import RuntimeReplica, Target


def candidates(
    target: Target, replicas: Iterable[RuntimeReplica], in_flight: Mapping[str, int]
) -> list[RuntimeReplica]:
    """The usable replicas, best first. `in_flight`: this gateway's own requests by pod uid."""
    usable = [replica for replica in replicas if replica.usable]
    if len(usable) < 2:
        return usable

    def load(replica: RuntimeReplica) -> int:
        reported = replica.state.in_flight if replica.state is not None else 0
        return max(reported, in_flight.get(replica.endpoint.pod_uid, 0))

    if target.adapter is None:
        return sorted(usable, key=lambda item: (item.poll_failed, load(item), item.endpoint.pod_uid))
    order = placement.placement_order(target.adapter.uid, (placement.Replica(item.endpoint.pod_uid) for item in usable))
    rank = {pod_uid: position for position, pod_uid in enumerate(order)}

    def preference(replica: RuntimeReplica) -> tuple[bool, bool, int, int]:
        loaded = is_loaded(target, replica)
        return replica.poll_failed, not loaded, load(replica) if loaded else 0, rank[replica.endpoint.pod_uid]

    return sorted(usable, key=preference)


def is_loaded(target: Target, replica: RuntimeReplica) -> bool:
    """Whether this replica answers the target without loading anything first."""
    if target.key is None:
        return True
    return replica.state is not None and tuple(target.key) in replica.state.loaded
