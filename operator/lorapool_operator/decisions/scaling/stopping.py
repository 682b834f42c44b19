"""Which pods are stopped when a base gets fewer replicas, and what happens before.

The emptiest pods are stopped. The annotation pod-deletion-cost names them to Kubernetes. Of groups, a LeaderWorkerSet
stops those with the highest numbers. Before, adapters that are in use on them are loaded on replicas that stay, so that
no request waits for a load afterwards.
"""

from __future__ import annotations

from dataclasses import replace

from lorapool_operator.decisions.scaling.scale import ScaleDecision
from lorapool_operator.world.cluster_cache import PodObject
from lorapool_operator.world.observed import ObservedAdapter, ObservedBase, RuntimeView

HAND_OVER_S = 5.0
"""Time for loading the adapters of a pod that is about to be stopped on other replicas."""
RECENT_S = 60.0
"""An adapter without requests for this long is not loaded in advance."""
FIRST, LATER = "-1", "0"


def hand_over(observed: ObservedBase, decision: ScaleDecision, current: int | None, now: float) -> ScaleDecision:
    """Puts off a scale-down for a moment while the pods to be stopped have adapters on their devices."""
    if current is None or not 0 < decision.replicas < current:
        return decision
    memory = observed.memory
    leaving = tuple(pod.meta.uid for pod in emptiest(observed, _surplus(observed, decision)))
    if not any(view.current is not None and view.current.slots_used for view in _views(observed, leaving)):
        return decision
    since = memory.leaving_since_unix_s if memory.leaving and memory.leaving_since_unix_s is not None else now
    if now >= since + HAND_OVER_S:
        return decision
    kept = memory.leaving if len(memory.leaving) == len(leaving) else leaving
    waiting = replace(memory, leaving=kept, leaving_since_unix_s=since)
    return ScaleDecision(current, f"{decision.reason}; adapters are moving", waiting, since + HAND_OVER_S)


def deletion_costs(observed: ObservedBase, decision: ScaleDecision, current: int | None) -> tuple[tuple[str, str], ...]:
    """Returns (pod, cost) of the annotations to be written before the number of replicas is lowered."""
    if current is None or not 0 < decision.replicas < current or any(pod.group is not None for pod in observed.pods):
        return ()
    first = set(observed.memory.leaving) or {pod.meta.uid for pod in emptiest(observed, _surplus(observed, decision))}
    wanted = {pod.meta.name: FIRST if pod.meta.uid in first else LATER for pod in _alive(observed)}
    known = {pod.meta.name: pod.deletion_cost or LATER for pod in observed.pods}
    return tuple((name, cost) for name, cost in sorted(wanted.items()) if known[name] != cost)


def emptiest(observed: ObservedBase, number: int) -> list[PodObject]:
    """Returns the pods to be stopped: not serving, then fewest requests, fewest adapters, youngest; the last groups."""
    views = {view.pod_uid: view for view in observed.runtimes}

    def load(pod: PodObject) -> tuple[bool, int, int]:
        view = views.get(pod.meta.uid)
        now = view.current if view is not None else None
        if view is None or now is None:
            return False, 0, 0
        return view.serving, now.in_flight + now.waiting, now.slots_used

    def order(pod: PodObject) -> tuple[float, ...]:
        return (-pod.group,) if pod.group is not None else (*load(pod), -pod.meta.created_unix_s)

    alive = sorted(_alive(observed), key=lambda pod: (order(pod), pod.meta.name))
    return alive[: max(0, number)]


def takes_over(observed: ObservedAdapter, digest: str, k: int, now: float) -> frozenset[str]:
    """Returns the replicas that should load an adapter because one that has it loaded is about to be stopped."""
    if not observed.leaving:
        return frozenset()
    holders = {item.runtime.pod_uid: item for item in observed.holders if item.holds(digest)}
    going = [item for uid, item in holders.items() if uid in observed.leaving]
    if not going or (now >= max(item.last_used_unix_s for item in going) + RECENT_S and not observed.requests):
        return frozenset()
    free = {item.runtime.pod_uid for item in observed.replicas if item.runtime.has_free_slot}
    staying = [uid for uid in observed.serving_pod_uids if uid not in observed.leaving][:k]
    return frozenset(uid for uid in staying if uid in holders or uid in free)


def _surplus(observed: ObservedBase, decision: ScaleDecision) -> int:
    return len(_alive(observed)) - decision.replicas


def _alive(observed: ObservedBase) -> list[PodObject]:
    return [pod for pod in observed.pods if not pod.terminating]


def _views(observed: ObservedBase, uids: tuple[str, ...]) -> list[RuntimeView]:
    return [view for view in observed.runtimes if view.pod_uid in uids]
