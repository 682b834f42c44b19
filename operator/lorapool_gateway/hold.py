"""Bounded waiting of requests that nothing can answer yet.

Called by dispatch. Two kinds of line: one per base (no replica takes the request) and one per adapter (not
judged yet), so that one broken adapter cannot fill its base's line. Over the bound: 429 at once. A place is
given back when the request is answered, too late, or its client has left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorapool_api.openai import TooManyRequests

RETRY_AFTER_S = 2.0


class Hold:
    def __init__(self, on_change: Callable[[str, int], None]) -> None:
        """`on_change(base, +1 | -1)` counts for the gauge."""
        self._waiting: Counter[str] = Counter()
        self._on_change = on_change

    def waiting(self, line: str) -> int:
        return self._waiting[line]

    @contextmanager
    def place(self, line: str, base: str, bound: int, *, known: bool) -> Iterator[None]:
        """One place in a line. `known`: this request stood in a line before and is not sent away now.

        Raises TooManyRequests with Retry-After when the line is full.
        """
        if not known and self._waiting[line] >= bound:
            raise TooManyRequests(
                f"Too many requests wait for {base} to start; at most {bound} are held.",
                code="too_many_held_requests",
                retry_after_s=RETRY_AFTER_S,
            )
        self._waiting[line] += 1
        self._on_change(base, 1)
        try:
            yield
        finally:
            self._waiting[line] -= 1
            if self._waiting[line] <= 0:
                del self._waiting[line]
            self._on_change(base, -1)
