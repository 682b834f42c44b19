"""Which waiting request starts next: pure, no clock and no engine.

Requests of one adapter, or of the base, form a flow. The flow that has been served the fewest tokens is next, so that
each gets the same share of the engine however many requests another one sends. A flow that returns after a pause
starts at the count of the least served one: it saves up nothing. (This is Virtual Token Counter scheduling: unlike
deficit round robin it needs no guess of how long an answer will be.)

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


@dataclass(slots=True)
class _Flow:
    served: int
    """Tokens so far, from the level at which the flow became active."""
    waiting: deque[Ticket] = field(default_factory=deque)
    running: int = 0
    """Sequences that were started and have not ended."""


class FairQueue:
    def __init__(self, rows: int) -> None:
        """`rows`: sequences that the engine computes at a time."""
        self._rows = rows
        self._ahead = max(1, rows // 8)
        """Sequences started beyond `rows`, so that the engine finds the next one when a sequence ends."""
        self._flows: dict[str, _Flow] = {}
        self._running = 0

    def waiting(self, flow: str) -> int:
        """Requests of the flow that wait for their turn."""
        return len(self._flows[flow].waiting) if flow in self._flows else 0

    def join(self, ticket: Ticket) -> None:
        """Queues a request behind the others of its flow."""
        if ticket.flow not in self._flows:
            self._flows[ticket.flow] = _Flow(min((flow.served for flow in self._flows.values()), default=0))
        self._flows[ticket.flow].waiting.append(ticket)

    def start_next(self) -> Ticket | None:
        """Starts the next request and returns it; None when none may start now."""
        share = max(1, self._rows // max(1, len(self._flows)))
        has_room = self._running < self._rows + self._ahead
        ready = [flow for flow in self._flows.values() if flow.waiting and (has_room or flow.running < share)]
        if not ready:
            return None
        flow = min(ready, key=lambda flow: flow.served)
        ticket = flow.waiting.popleft()
        flow.served += ticket.tokens
        flow.running += ticket.sequences
        self._running += ticket.sequences
        return ticket

    def charge(self, ticket: Ticket, tokens: int) -> None:
        """Counts tokens that were generated for a running request."""
        self._flows[ticket.flow].served += tokens

    def end(self, ticket: Ticket) -> None:
        """Takes out a running request."""
        flow = self._flows[ticket.flow]
        flow.running -= ticket.sequences
        self._running -= ticket.sequences
        self._forget_idle(ticket.flow)

    def leave(self, ticket: Ticket) -> None:
        """Takes out a request that waits."""
        self._flows[ticket.flow].waiting.remove(ticket)
        self._forget_idle(ticket.flow)

    def recall(self, name: str) -> list[Ticket]:
        """Takes out all requests of a flow that wait, and returns them in their order."""
        if name not in self._flows:
            return []
        recalled = list(self._flows[name].waiting)
        self._flows[name].waiting.clear()
        self._forget_idle(name)
        return recalled

    def _forget_idle(self, name: str) -> None:
        flow = self._flows[name]
        if not flow.waiting and not flow.running:
            del self._flows[name]


class FairBound:
    """Bounds accepted sequences. When all places are taken, a flow still gets its share of them.

    So the places of one flow never exclude another. All flows together have at most twice the bound.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.taken = 0
        self._by_flow: dict[str, int] = {}

    def admits(self, flow: str, sequences: int) -> bool:
        """Whether the flow may take so many more places."""
        own = self._by_flow.get(flow, 0) + sequences
        if self.taken + sequences <= self.places:
            return True
        share = self.places // len(self._by_flow.keys() | {flow})
        return own <= share and self.taken + sequences <= 2 * self.places

    def enter(self, flow: str, sequences: int) -> None:
        self.taken += sequences
        self._by_flow[flow] = self._by_flow.get(flow, 0) + sequences

    def leave(self, flow: str, sequences: int) -> None:
        self.taken -= sequences
        self._by_flow[flow] -= sequences
        if not self._by_flow[flow]:
            del self._by_flow[flow]
