"""How many replicas a base should have, from its spec and what its runtimes report. Pure.

Called by `plan_base`. Up at once when load exceeds the target; down only after load stayed low for
`scaleDownDelay`; to the floor (which may be 0) only after `idleAfter` without any request. Never down while
anything is under way, while a replica is still starting (within an allowance), or while one cannot be asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorapool_api.basemodel import Scaling
from lorapool_api.common import duration_s

INITIAL_REPLICAS = 1
"""A new base starts once, so that what is wrong with it is seen before the first request is."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is seen of a base's replicas now."""

    in_flight: int
    """Running and waiting requests over all replicas that could be asked."""
    silent: int
    """Ready replicas that could not be asked."""
    ready: int
    """Replicas that serve."""
    last_activity_unix_s: float
    """Latest of: a request, a replica's start, the wake that asked for it, the object's creation."""


@dataclass(frozen=True, slots=True)
class ScaleMemory:
    """Carried from one decision to the next."""

    low_since_unix_s: float | None = None


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    replicas: int
    reason: str
    memory: ScaleMemory
    recheck_unix_s: float | None
    """When time alone could change the answer."""


def initial_replicas(scaling: Scaling, floor: int) -> int:
    """What an object without spec.replicas starts with."""
    return _clamp(max(INITIAL_REPLICAS, floor), scaling, floor)


def decide(
    current: int, scaling: Scaling, load: Load, memory: ScaleMemory, *, floor: int, now: float, start_allowance_s: float
) -> ScaleDecision:
    """The number of replicas to ask for; `floor` is what warm adapters need, on top of minReplicas."""
    lowest, bounded = _clamp(0, scaling, floor), _clamp(current, scaling, floor)
    calm = ScaleMemory()
    if current == 0:
        return ScaleDecision(bounded, "warm replicas are wanted" if bounded else "asleep", calm, None)
    if bounded != current:
        return ScaleDecision(bounded, f"bounds are {lowest} to {scaling.max_replicas}", calm, None)
    if load.in_flight > 0 or load.silent > 0:
        needed = _clamp(max(1, math.ceil(load.in_flight / scaling.target_in_flight)), scaling, floor)
        if needed > current:
            return ScaleDecision(needed, f"{load.in_flight} requests in flight", calm, None)
        if load.silent > 0:
            return ScaleDecision(current, f"{load.silent} replicas do not answer", calm, None)
        return _down(current, needed, f"{load.in_flight} requests in flight", scaling, memory, now)
    if load.ready < current:
        return _starting(current, lowest, scaling, load, now, start_allowance_s)
    idle_at = load.last_activity_unix_s + duration_s(scaling.idle_after)
    if now >= idle_at:
        return ScaleDecision(lowest, f"no request for {scaling.idle_after}", calm, None)
    one = _clamp(max(1, lowest), scaling, floor)
    down = _down(current, one, "no request in flight", scaling, memory, now)
    recheck = idle_at if down.recheck_unix_s is None else min(idle_at, down.recheck_unix_s)
    return ScaleDecision(down.replicas, down.reason, down.memory, recheck if current > lowest else None)


def _starting(
    current: int, lowest: int, scaling: Scaling, load: Load, now: float, start_allowance_s: float
) -> ScaleDecision:
    """Not all replicas serve yet: someone asked for them, so a short idleAfter must not take them back."""
    patience_s = max(duration_s(scaling.idle_after), start_allowance_s)
    if load.ready > 0:
        patience_s = duration_s(scaling.idle_after)
    give_up_at = load.last_activity_unix_s + patience_s
    if now >= give_up_at:
        return ScaleDecision(lowest, f"not started within {int(patience_s)}s", ScaleMemory(), None)
    return ScaleDecision(current, "starting", ScaleMemory(), give_up_at if current > lowest else None)


def _down(current: int, needed: int, why: str, scaling: Scaling, memory: ScaleMemory, now: float) -> ScaleDecision:
    if needed >= current:
        return ScaleDecision(current, why, ScaleMemory(), None)
    since = memory.low_since_unix_s if memory.low_since_unix_s is not None else now
    due = since + duration_s(scaling.scale_down_delay)
    if now < due:
        return ScaleDecision(current, why, ScaleMemory(since), due)
    return ScaleDecision(needed, f"{why} for {scaling.scale_down_delay}", ScaleMemory(), None)


def _clamp(replicas: int, scaling: Scaling, floor: int) -> int:
    lowest = min(max(scaling.min_replicas, floor), scaling.max_replicas)
    return min(max(replicas, lowest), scaling.max_replicas)
