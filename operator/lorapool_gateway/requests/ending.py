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
        self._blocks: set[_Bound] = set()
        """Those that run now."""
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
        for block in self._blocks:
            block.end()

    def _add(self, block: _Bound) -> None:
        self._blocks.add(block)
        if self._ended:
            asyncio.get_running_loop().call_soon(block.end)
        elif self._sweep is None:
            self._sweep = asyncio.get_running_loop().call_later(SWEEP_S, self._end_late)

    def _remove(self, block: _Bound) -> None:
        self._blocks.remove(block)

    def _end_late(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for block in self._blocks:
            if block.deadline <= now:
                block.end()
        self._sweep = loop.call_later(SWEEP_S, self._end_late) if self._blocks else None

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
    """A block of a task that `end` interrupts by cancelling the task.

    As in asyncio.Timeout, which takes three times as long, a cancellation that another part has asked for prevails.
    """

    __slots__ = ("_cancelled", "_cancelling", "_ending", "_running", "_task", "deadline")

    def __init__(self, ending: Ending, deadline: float) -> None:
        self._ending = ending
        self.deadline = deadline
        self._running = self._cancelled = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling, self._running = task, task.cancelling(), True
        self._ending._add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running = False
        self._ending._remove(self)
        if self._cancelled and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._ending._error() from None

    def end(self) -> None:
        if self._running and not self._cancelled:
            self._cancelled = True
            self._task.cancel()
