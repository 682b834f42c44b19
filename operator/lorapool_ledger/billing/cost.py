"""What an interval of a pod costs by adapter: parts that add up to the pod's price to the last unit.

With `C` the cost of the interval, `T` its length and `m` the share of the device's memory that adapters' slots have:

    compute of an account    = (1 - m) * C * gpu_ns / T
    residency of an account  = m * C * byte_ns / (slot_bytes * T)
    idle                     = C - all parts

A part is a whole number of units; what is left of the exact parts by cutting them goes to those with the largest
remainders, idle included, so that the sum is `C`. *Cost* is what the provider pays for the pod; what the tenant pays is
a price (`billing.prices`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import NamedTuple, TypeVar

K = TypeVar("K")

UNIT = Decimal("0.000000001")
"""Costs are whole billionths of the currency."""
IDLE = "__idle__"
"""The account of what no adapter caused."""


class Used(NamedTuple):
    """What an account used in the interval."""

    gpu_ns: int = 0
    """Its share of the time of the engine's steps."""
    byte_ns: int = 0
    """Bytes of slots that it occupied, times nanoseconds."""


class Cost(NamedTuple):
    """An account's part, in units."""

    compute: int = 0
    residency: int = 0

    @property
    def total(self) -> int:
        return self.compute + self.residency


@dataclass(frozen=True, slots=True)
class SplitCost:
    """The cost of a pod in an interval, in units."""

    accounts: Mapping[str, Cost]
    idle: int

    @property
    def total(self) -> int:
        return self.idle + sum(cost.total for cost in self.accounts.values())


def pod_cost(per_hour: Decimal, uptime_ns: int) -> int:
    """The cost of a pod for this long, in units."""
    return int((per_hour * uptime_ns / (3600 * 10**9) / UNIT).to_integral_value(ROUND_HALF_EVEN))


def money(units: int) -> Decimal:
    """Units as an amount of the currency."""
    return units * UNIT


def split_cost(cost: int, used: Mapping[str, Used], *, uptime_ns: int, slot_bytes: int, device_bytes: int) -> SplitCost:
    """Splits a pod's cost over the accounts that used it, the base's (the empty name) included.

    Clocks that disagree by a little may have more used than there was: then everything was used.
    """
    slot_bytes = max(0, min(slot_bytes, device_bytes))
    time = max(1, uptime_ns, sum(one.gpu_ns for one in used.values()))
    room = max(1, slot_bytes * uptime_ns, sum(one.byte_ns for one in used.values()))
    # Weights over one denominator, memory * time * room: whole numbers, so that nothing is rounded before the split.
    memory = max(1, device_bytes)
    weights: dict[tuple[str, str], int] = {}
    for account, one in used.items():
        weights[account, "compute"] = (memory - slot_bytes) * one.gpu_ns * room
        weights[account, "residency"] = slot_bytes * one.byte_ns * time
    weights[IDLE, ""] = memory * time * room - sum(weights.values())
    parts = largest_remainder(cost, weights)
    accounts = {name: Cost(parts[name, "compute"], parts[name, "residency"]) for name in used}
    return SplitCost(accounts, parts[IDLE, ""])


def spread_idle(split: SplitCost) -> SplitCost:
    """The same cost with idle spread over the accounts by what they cost. Where no account cost anything it stays."""
    weights = {name: cost.total for name, cost in split.accounts.items()}
    if not any(weights.values()):
        return split
    more = largest_remainder(split.idle, weights)
    return SplitCost(
        {name: Cost(cost.compute + more[name], cost.residency) for name, cost in split.accounts.items()}, 0
    )


def largest_remainder(total: int, weights: Mapping[K, int]) -> dict[K, int]:
    """Splits a whole number by weights (0 or more, not all 0) into whole parts that add up to it."""
    whole = sum(weights.values())
    parts = {key: total * weight // whole for key, weight in weights.items()}
    left = total - sum(parts.values())
    first = sorted(weights, key=lambda key: total * weights[key] % whole, reverse=True)  # stable: ties by their order
    for key in first[:left]:
        parts[key] += 1
    return parts
