"""Which adapter's files are fetched next: pure, no clock and no I/O.

Each namespace has its share of the concurrent fetches, and one share is always left for a namespace that comes next, so
that the slow sources of one do not delay the loads of another. Adapters that requests wait for are first; within a
namespace the order is first come, first served.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from lorapool_api.common import AdapterKey


@dataclass(slots=True)
class FetchQueue:
    total: int
    """Concurrent fetches."""
    _waiting: dict[AdapterKey, str] = field(default_factory=dict)
    """Namespace of each adapter in the queue, in the order of their arrival."""
    _running: dict[AdapterKey, str] = field(default_factory=dict)

    def join(self, key: AdapterKey, namespace: str) -> None:
        self._waiting[key] = namespace

    def leave(self, key: AdapterKey) -> None:
        """Takes out an adapter that waits, or whose fetch has ended."""
        self._waiting.pop(key, None)
        self._running.pop(key, None)

    def start_next(self, wanted: Callable[[AdapterKey], bool]) -> AdapterKey | None:
        """Starts the next fetch; None when none may start now. `wanted`: a request waits for the adapter."""
        running = Counter(self._running.values())
        share = max(1, self.total // (len(running.keys() | set(self._waiting.values())) + 1))
        ready = [key for key, namespace in self._waiting.items() if running[namespace] < share]
        if not ready or len(self._running) >= self.total:
            return None
        key = min(ready, key=lambda key: (not wanted(key), running[self._waiting[key]]))
        self._running[key] = self._waiting.pop(key)
        return key
