"""Ends requests with an error that says why, not by a cut connection: at their deadline, or when the process stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lorapool_api.openai import CODE_DRAINING, UnavailableError


class Ending:
    def __init__(self, deadline_s: float) -> None:
        """`deadline_s`: how long a request may take in all."""
        self._deadline_s = deadline_s
        self._bounds: set[asyncio.Timeout] = set()
        self._ended = False

    def deadline(self) -> float:
        """The time of the event loop's clock at which a request that arrives now is ended."""
        return asyncio.get_running_loop().time() + self._deadline_s

    @asynccontextmanager
    async def bound(self, deadline: float) -> AsyncIterator[None]:
        """Runs the block until its deadline or `end`, which interrupt its wait and make this raise UnavailableError."""
        try:
            async with asyncio.timeout_at(0 if self._ended else deadline) as bound:
                self._bounds.add(bound)
                try:
                    yield
                finally:
                    self._bounds.discard(bound)
        except TimeoutError:
            if not bound.expired():
                raise
            raise self._error() from None

    def end(self) -> None:
        """Ends every block, also those that begin later."""
        self._ended = True
        for bound in self._bounds:
            bound.reschedule(asyncio.get_running_loop().time())

    def _error(self) -> UnavailableError:
        if self._ended:
            return UnavailableError(
                "The gateway stops and cannot wait longer for this request.", code=CODE_DRAINING, retry_after_s=1
            )
        return UnavailableError(
            f"The request took longer than the {self._deadline_s:g} s that the gateway allows. Ask for fewer tokens.",
            code="deadline_exceeded",
        )
