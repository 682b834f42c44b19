"""Which idle base gives its devices to a base that is being woken and cannot be scheduled.

A base keeps its pods for `idleAfter`, so that the next request finds them. While another base's requests wait for a
node with free devices, an idle base yields at once; the one that has been idle longest yields first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorapool_operator.decisions.scaling.scale import Load
from lorapool_operator.world.cluster_cache import Key
from lorapool_operator.world.observed import ObservedBase, Standing
from lorapool_operator.world.profiles import device_names

INSUFFICIENT = re.compile(r"Insufficient ([a-z0-9./-]*/[a-z0-9._-]*[a-z0-9])")
MIN_IDLE_S = 5.0
"""A base with a request just before is not idle: two bases that share one device must not stop each other in turn."""


def standing_of(observed: ObservedBase, load: Load, lowest: int) -> Standing:
    """Returns what a base lacks, or what it could yield. `lowest` is its lower bound of replicas."""
    alive = [pod for pod in observed.pods if not pod.terminating]
    if not load.ready:
        return Standing(lacks=frozenset(name for pod in alive for name in INSUFFICIENT.findall(pod.problem)))
    if observed.profile is None or lowest or load.in_flight or load.silent or load.ready < len(alive):
        return Standing()
    return Standing(idle_since_unix_s=load.last_activity_unix_s, devices=device_names(observed.profile.resources))


def choose(lacks: frozenset[str], bases: Mapping[Key, Standing], now: float) -> Key | None:
    """Returns the base that has been idle longest among those that occupy what is lacking; None if there is none."""
    idle = [
        (item.idle_since_unix_s, key)
        for key, item in bases.items()
        if item.idle_since_unix_s is not None and item.devices & lacks and now >= item.idle_since_unix_s + MIN_IDLE_S
    ]
    return min(idle)[1] if idle else None
