"""How many preferred replicas one adapter has, by its own load.

A cold adapter has one, so that it is loaded once and every gateway finds it there without any write. A hot one gets
more when its requests exceed the target per preferred replica for some seconds, and loses them when its load was low
for the base's `scaleDownDelay`. Operator and gateways then use the first k replicas of its placement order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorapool_operator.world.observed import SpreadMemory

UP_AFTER_S = 3.0
"""A shorter burst does not spread an adapter: loading it elsewhere would end when the burst is over."""
DOWN_SHARE = 0.7
"""Fewer replicas must be filled to this share at most before one is given up, so that the number does not alternate."""


@dataclass(frozen=True, slots=True)
class SpreadDecision:
    """The number of preferred replicas."""

    k: int
    why: str
    """Empty if k did not change."""
    memory: SpreadMemory
    recheck_unix_s: float | None = None
    """When the passing of time alone could change the decision."""


def decide(
    k: int,
    requests: int,
    *,
    lowest: int,
    highest: int,
    target: int,
    down_delay_s: float,
    memory: SpreadMemory,
    now: float,
) -> SpreadDecision:
    """Decides k from the adapter's running and waiting requests, between `lowest` and `highest` (1 <= lowest).

    `target` is the number of requests per replica that the base's owner wants. Bounds take effect at once.
    """
    highest = max(lowest, highest)
    bounded = min(max(k, lowest), highest)
    if bounded != k:
        return SpreadDecision(bounded, f"between {lowest} and {highest} replicas are possible", memory)
    needed = min(max(math.ceil(requests / target), lowest), highest)
    enough = min(max(math.ceil(requests / (target * DOWN_SHARE)), lowest), highest)
    if needed > k:
        since = memory.high_since_unix_s if memory.high_since_unix_s is not None else now
        why = f"{requests} requests, {target} per replica are wanted"
        return _after(k, needed, why, SpreadMemory(high_since_unix_s=since), since + UP_AFTER_S, now)
    if enough < k:
        since = memory.low_since_unix_s if memory.low_since_unix_s is not None else now
        why = f"{requests} requests fit on {enough}"
        return _after(k, enough, why, SpreadMemory(low_since_unix_s=since), since + down_delay_s, now)
    return SpreadDecision(k, "", SpreadMemory())


def _after(k: int, wanted: int, why: str, memory: SpreadMemory, due: float, now: float) -> SpreadDecision:
    if now < due:
        return SpreadDecision(k, "", memory, due)
    return SpreadDecision(wanted, why, SpreadMemory())
