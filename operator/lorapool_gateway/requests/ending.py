"""Ends the requests in flight of a process that stops, each with an error that says so instead of a cut connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lorapool_api.openai import CODE_DRAINING, UnavailableError


class Ending:
    def __init__(self) -> None:
        self._bounds: set[asyncio.Timeout] = set()
        self._ended = False

    @asynccontextmanager
    async def bound(self) -> AsyncIterator[None]:
        """Runs the block until `end`, which interrupts its wait and makes this raise UnavailableError."""
        try:
            async with asyncio.timeout(0 if self._ended else None) as bound:
                self._bounds.add(bound)
                try:
                    yield
                finally:
                    self._bounds.discard(bound)
        except TimeoutError:
            if not bound.expired():
                raise
            raise UnavailableError(
                "The gateway stops and cannot wait longer for this request.", code=CODE_DRAINING, retry_after_s=1
            ) from None

    def end(self) -> None:
        """Ends every block, also those that begin later."""
        self._ended = True
        for bound in self._bounds:
            bound.reschedule(asyncio.get_running_loop().time())
