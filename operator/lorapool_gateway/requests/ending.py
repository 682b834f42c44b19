"""Ends requests with an error that says why, not by a cut connection: at their deadline, or when the process stops."""

from __future__ import annotations

import asyncio
from types import TracebackType

from lorapool_api.openai import CODE_DRAINING, UnavailableError

SWEEP_S = 0.25
"""A request is ended at most this long after its deadline. One timer for all costs less than one for each."""


class Ending:
    def __init__(self, deadline_s: float) -> None:
        """`deadline_s`: how long a request may take in all."""
        self._deadline_s = deadline_s
        self._deadlines: dict[asyncio.Timeout, float] = {}
        """By the blocks that run now."""
        self._sweep: asyncio.TimerHandle | None = None
        self._ended = False

    def deadline(self) -> float:
        """The time of the event loop's clock at which a request that arrives now is ended."""
        return asyncio.get_running_loop().time() + self._deadline_s

    def bound(self, deadline: float) -> _Bound:
        """Runs a block until its deadline or `end`, which interrupt its wait and make this raise UnavailableError."""
        return _Bound(self, deadline)

    def end(self) -> None:
        """Ends every block, also those that begin later."""
        self._ended = True
        for block in self._deadlines:
            _end(block)

    def _add(self, block: asyncio.Timeout, deadline: float) -> None:
        self._deadlines[block] = deadline
        if self._ended:
            _end(block)
        elif self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._end_late)

    def _remove(self, block: asyncio.Timeout) -> None:
        del self._deadlines[block]

    def _end_late(self) -> None:
        loop = asyncio.get_running_loop()
        for block, deadline in self._deadlines.items():
            if deadline <= loop.time():
                _end(block)
        self._sweep = loop.call_later(SWEEP_S, self._end_late) if self._deadlines else None

    def _error(self) -> UnavailableError:
        if self._ended:
            return UnavailableError(
                "The gateway stops and cannot wait longer for this request.", code=CODE_DRAINING, retry_after_s=1
            )
        return UnavailableError(
            f"The request took longer than the {self._deadline_s:g} s that the gateway allows. Ask for fewer tokens.",
            code="deadline_exceeded",
        )


class _Bound:
    __slots__ = ("_block", "_deadline", "_ending")

    def __init__(self, ending: Ending, deadline: float) -> None:
        self._ending = ending
        self._deadline = deadline
        self._block = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._block.__aenter__()
        self._ending._add(self._block, self._deadline)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending._remove(self._block)
        try:
            await self._block.__aexit__(kind, error, trace)
        except TimeoutError:
            raise self._ending._error() from None


def _end(block: asyncio.Timeout) -> None:
    if not block.expired():
        block.reschedule(asyncio.get_running_loop().time())
