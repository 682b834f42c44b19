"""Lets requests wait for their turn in the fair queue, on the event loop."""

from __future__ import annotations

import asyncio

from lorapool_api.openai import CODE_DRAINING, UnavailableError
from lorapool_runtime.serving.fair_queue import FairQueue, Ticket


class Turns:
    def __init__(self, rows: int) -> None:
        """`rows`: sequences that the engine computes at a time."""
        self._queue = FairQueue(rows)
        self._waiters: dict[Ticket, asyncio.Future[Turn | None]] = {}
        self._closed = False

    def waiting(self, flow: str) -> int:
        """Requests of the flow that wait for their turn."""
        return self._queue.waiting(flow)

    async def take(self, flow: str, *, tenant: str, sequences: int, tokens: int) -> Turn | None:
        """The turn of a request with so many sequences and prompt tokens; None when its flow was recalled.

        Raises UnavailableError when the replica shuts down.
        """
        ticket = Ticket(flow, sequences, tokens, tenant)
        waiter: asyncio.Future[Turn | None] = asyncio.get_running_loop().create_future()
        self._waiters[ticket] = waiter
        self._queue.join(ticket)
        self._start()
        try:
            turn = await asyncio.shield(waiter)
        except BaseException:
            if not waiter.done():
                self._queue.leave(ticket)
            elif (turn := waiter.result()) is not None:
                turn.end()
            raise
        finally:
            del self._waiters[ticket]
        if turn is None and self._closed:
            raise UnavailableError("The replica is shutting down.", code=CODE_DRAINING, retry_after_s=1)
        return turn

    def recall(self, flow: str) -> None:
        """Sends back all requests of a flow that wait for their turn, since its adapter leaves its slot."""
        for ticket in self._queue.recall(flow):
            self._waiters[ticket].set_result(None)

    def close(self) -> None:
        """Refuses the requests that wait for their turn, and all later ones."""
        self._closed = True
        for flow in {ticket.flow for ticket in self._waiters}:
            self.recall(flow)

    def charge(self, ticket: Ticket, tokens: int) -> None:
        self._queue.charge(ticket, tokens)

    def end(self, ticket: Ticket) -> None:
        self._queue.end(ticket)
        self._start()

    def _start(self) -> None:
        if self._closed:
            self.close()
        while (ticket := self._queue.start_next()) is not None:
            self._waiters[ticket].set_result(Turn(self, ticket))


class Turn:
    """The right of one request to run, until `end`."""

    def __init__(self, turns: Turns, ticket: Ticket) -> None:
        self._turns = turns
        self._ticket = ticket

    def charge(self, tokens: int) -> None:
        """Counts tokens that were generated for it."""
        self._turns.charge(self._ticket, tokens)

    def end(self) -> None:
        """To be called once."""
        self._turns.end(self._ticket)
