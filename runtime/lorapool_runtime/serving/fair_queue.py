"""Which waiting request starts next: pure, no clock and no engine.

Requests of one adapter, or of the base, and of one tenant form a flow. The tenant that has been served the fewest
tokens is next, and of its flows the one that has been served the fewest, so that each tenant gets the same share of
the engine, and each adapter the same share of its tenant's, however many requests another one sends. Who returns after
a pause starts at the count of the least served one: it saves up nothing. (This is Virtual Token Counter scheduling:
unlike deficit round robin it needs no guess of how long an answer will be.)

Only requests that run hold their adapter's slot, so few more are started than the engine computes at a time. A flow
that runs less than its share of the batch starts at once; the engine then pauses a sequence of a flow above its share.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the queue, or running."""

    flow: str
    sequences: int
    tokens: int
    """Tokens of its prompts, which are charged when it starts."""
    tenant: str = ""


@dataclass(slots=True)
class _Flow:
    served: int
    """Tokens so far, from the level at which the flow became active."""
    waiting: deque[Ticket] = field(default_factory=deque)
    running: int = 0
    """Sequences that were started and have not ended."""


@dataclass(slots=True)
class _Tenant:
    served: int
    """As of a flow."""
    flows: dict[str, _Flow] = field(default_factory=dict)


class FairQueue:
    def __init__(self, rows: int) -> None:
        """`rows`: sequences that the engine computes at a time."""
        self._rows = rows
        self._ahead = max(1, rows // 8)
        """Sequences started beyond `rows`, so that the engine finds the next one when a sequence ends."""
        self._tenants: dict[str, _Tenant] = {}
        self._running = 0

    def waiting(self, flow: str) -> int:
        """Requests for the adapter, or the base, that wait for their turn."""
        return sum(len(tenant.flows[flow].waiting) for tenant in self._tenants.values() if flow in tenant.flows)

    def join(self, ticket: Ticket) -> None:
        """Queues a request behind the others of its flow."""
        if ticket.tenant not in self._tenants:
            self._tenants[ticket.tenant] = _Tenant(_level(self._tenants))
        flows = self._tenants[ticket.tenant].flows
        if ticket.flow not in flows:
            flows[ticket.flow] = _Flow(_level(flows))
        flows[ticket.flow].waiting.append(ticket)

    def start_next(self) -> Ticket | None:
        """Starts the next request and returns it; None when none may start now."""
        has_room = self._running < self._rows + self._ahead
        ready = [
            (tenant, flow)
            for tenant in self._tenants.values()
            for flow in tenant.flows.values()
            if flow.waiting and (has_room or flow.running < self._share(tenant))
        ]
        if not ready:
            return None
        tenant, flow = min(ready, key=lambda pair: (pair[0].served, pair[1].served))
        ticket = flow.waiting.popleft()
        tenant.served += ticket.tokens
        flow.served += ticket.tokens
        flow.running += ticket.sequences
        self._running += ticket.sequences
        return ticket

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Counts tokens that were generated for a running request."""
        tenant = self._tenants[ticket.tenant]
        tenant.served += tokens
        tenant.flows[ticket.flow].served += tokens

    def end(self, ticket: Ticket) -> None:
        """Takes out a running request."""
        self._tenants[ticket.tenant].flows[ticket.flow].running -= ticket.sequences
        self._running -= ticket.sequences
        self._forget_idle(ticket.tenant, ticket.flow)

    def leave(self, ticket: Ticket) -> None:
        """Takes out a request that waits."""
        self._tenants[ticket.tenant].flows[ticket.flow].waiting.remove(ticket)
        self._forget_idle(ticket.tenant, ticket.flow)

    def recall(self, flow: str) -> list[Ticket]:
        """Takes out all requests for an adapter that wait, and returns them, those of one tenant in their order."""
        recalled: list[Ticket] = []
        for name, tenant in list(self._tenants.items()):
            if flow in tenant.flows:
                recalled += tenant.flows[flow].waiting
                tenant.flows[flow].waiting.clear()
                self._forget_idle(name, flow)
        return recalled

    def _share(self, tenant: _Tenant) -> int:
        """Sequences of one flow of the tenant that may run however full the batch is."""
        return max(1, self._rows // len(self._tenants) // len(tenant.flows))

    def _forget_idle(self, name: str, flow_name: str) -> None:
        flows = self._tenants[name].flows
        if not flows[flow_name].waiting and not flows[flow_name].running:
            del flows[flow_name]
        if not flows:
            del self._tenants[name]


def _level(others: dict[str, _Tenant] | dict[str, _Flow]) -> int:
    """The count at which a tenant or flow begins that was not active."""
    return min((other.served for other in others.values()), default=0)
