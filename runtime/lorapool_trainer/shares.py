"""Which jobs compute next: weighted fair queuing by tokens, between tenants first and between a tenant's jobs then.

Each account counts the tokens that were computed for it, divided by its weight; the one with the least comes next
(start-time fair queuing, Goyal et al., 1996). One that comes back has no claim to what it did not use. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Demand(NamedTuple):
    """What one job could compute now."""

    uid: str
    tenant: str
    weight: int
    tokens: tuple[int, ...]
    """Of each of its next pieces of work, in their order; not empty."""


@dataclass
class Shares:
    """Tokens by weight of each tenant and each job, as far as they want to compute."""

    tenants: dict[str, float] = field(default_factory=dict)
    jobs: dict[str, float] = field(default_factory=dict)

    def plan(self, demands: Iterable[Demand], budget: int) -> dict[str, int]:
        """How many pieces of which job travel together within `budget` tokens, at least one piece in all.

        The cycle ends early rather than letting others run ahead by more than half a budget of a tenant that has no
        more work in this cycle, because its step must end first: it goes on in the next cycle.
        """
        waiting = {demand.uid: demand for demand in demands}
        self._keep(waiting.values())
        ahead = Shares(dict(self.tenants), dict(self.jobs))
        taken: dict[str, int] = {}
        left = budget
        while (demand := ahead._next(waiting.values(), taken)) is not None:
            size = demand.tokens[taken.get(demand.uid, 0)]
            behind = min(ahead.tenants.values())
            if taken and (size > left or ahead.tenants[demand.tenant] > behind + budget / 2):
                break
            taken[demand.uid] = taken.get(demand.uid, 0) + 1
            left -= size
            ahead.charge(demand, size)
        return taken

    def charge(self, demand: Demand, tokens: int) -> None:
        """Counts computed tokens."""
        self.tenants[demand.tenant] += tokens
        self.jobs[demand.uid] += tokens / max(1, demand.weight)

    def _next(self, demands: Iterable[Demand], taken: Mapping[str, int]) -> Demand | None:
        able = [demand for demand in demands if taken.get(demand.uid, 0) < len(demand.tokens)]
        return min(able, key=lambda item: (self.tenants[item.tenant], self.jobs[item.uid], item.uid), default=None)

    def _keep(self, demands: Iterable[Demand]) -> None:
        """Accounts of what wants to compute; a new one begins with the least of the others."""
        listed = list(demands)
        self.tenants = _joined(self.tenants, {demand.tenant for demand in listed})
        self.jobs = _joined(self.jobs, {demand.uid for demand in listed})


def _joined(known: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    kept = {name: known[name] for name in names if name in known}
    least = min(kept.values(), default=0.0)
    return {name: kept.get(name, least) - least for name in names}
