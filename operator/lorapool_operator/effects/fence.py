"""The fence that every write passes, to the API server or to a runtime: only the leader writes."""

from __future__ import annotations

from collections.abc import Callable


class FencedError(Exception):
    """This process does not hold the Lease any more, so it may not write."""


class Fence:
    """Open while this process certainly holds the Lease."""

    def __init__(self, may_write: Callable[[], bool] = lambda: True) -> None:
        self._may_write = may_write

    def check(self) -> None:
        """Is called right before each write. Raises FencedError."""
        if not self._may_write():
            raise FencedError("this process does not hold the Lease any more: nothing is written")
