"""How many replicas a base should have, by its spec and the load that its runtimes report.

Scales up at once when the load exceeds the target, down only after the load was low for `scaleDownDelay`, and to the
lower bound (which may be 0) only after `idleAfter` without any request. Never scales down while a wanted replica is
starting (within an allowance) or while a ready replica does not answer, nor to the bound while a request is in flight.
With scaling mode External it changes the number only from 0 and to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lorapool_api.basemodel import Scaling, ScalingMode
from lorapool_api.common import duration_s
from lorapool_operator.world.observed import ScaleMemory

INITIAL_REPLICAS = 1
"""A new base starts once, so that a misconfiguration shows before the first request."""


@dataclass(frozen=True, slots=True)
class Load:
    """The present load and state of a base's replicas."""

    in_flight: int
    """Running and queued requests, summed over all replicas that answer."""
    silent: int
    """Number of ready replicas that do not answer."""
    ready: int
    """Number of replicas that serve."""
    last_activity_unix_s: float
    """The latest of: a request, the readiness of a replica, the wake-up that asked for it, the object's creation.

    Readiness counts because a start can take longer than `idleAfter`: the requests that are held for the base get that
    long to arrive.
    """
    asked_unix_s: float = 0.0
    """When the newest replica was asked for: a wake-up or the creation of its pod."""


@dataclass(frozen=True, slots=True)
class ScaleDecision:
    """The number of replicas to ask for, and why."""

    replicas: int
    reason: str
    memory: ScaleMemory
    recheck_unix_s: float | None
    """When the passing of time alone could change the decision."""


def lowest_replicas(scaling: Scaling, floor: int) -> int:
    """Returns the number of replicas that an idle base keeps; the adapters with minReplicas need `floor` of them."""
    return _clamp(0, scaling, floor)


def initial_replicas(scaling: Scaling, floor: int) -> int:
    """Returns the number of replicas for an object without spec.replicas."""
    return _clamp(max(INITIAL_REPLICAS, floor), scaling, floor)


def decide(
    current: int, scaling: Scaling, load: Load, memory: ScaleMemory, *, floor: int, now: float, start_allowance_s: float
) -> ScaleDecision:
    """Decides the number of replicas. `floor` is how many the adapters with minReplicas need."""
    lowest, bounded = lowest_replicas(scaling, floor), _clamp(current, scaling, floor)
    calm = ScaleMemory()
    if current == 0:
        return ScaleDecision(bounded, "warm replicas are wanted" if bounded else "scaled to zero", calm, None)
    if scaling.mode is ScalingMode.EXTERNAL:
        return _external(current, lowest, scaling, load, now, start_allowance_s)
    if bounded != current:
        return ScaleDecision(bounded, f"bounds are {lowest} to {scaling.max_replicas}", calm, None)
    if load.in_flight > 0 or load.silent > 0:
        needed = _clamp(max(1, math.ceil(load.in_flight / scaling.target_in_flight)), scaling, floor)
        if needed > current:
            return ScaleDecision(needed, f"{load.in_flight} requests in flight", calm, None)
        if load.silent > 0:
            return ScaleDecision(current, f"{load.silent} replicas do not answer", calm, None)
        give_up_at = load.asked_unix_s + start_allowance_s
        if needed < current and load.ready < current and now < give_up_at:
            return ScaleDecision(current, "starting", calm, give_up_at)
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


def _external(
    current: int, lowest: int, scaling: Scaling, load: Load, now: float, start_allowance_s: float
) -> ScaleDecision:
    """Leaves the number to an autoscaler, except that an idle base without a lower bound is scaled to zero."""
    stay = ScaleDecision(current, "an external autoscaler decides", ScaleMemory(), None)
    if lowest > 0 or load.in_flight > 0 or load.silent > 0:
        return stay
    if load.ready < min(current, scaling.max_replicas):
        return _starting(current, lowest, scaling, load, now, start_allowance_s)
    idle_at = load.last_activity_unix_s + duration_s(scaling.idle_after)
    if now >= idle_at:
        return ScaleDecision(0, f"no request for {scaling.idle_after}", ScaleMemory(), None)
    return replace(stay, recheck_unix_s=idle_at)


def _starting(
    current: int, lowest: int, scaling: Scaling, load: Load, now: float, start_allowance_s: float
) -> ScaleDecision:
    """Waits while not all replicas serve: a short idleAfter must not revoke replicas that were just asked for."""
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
