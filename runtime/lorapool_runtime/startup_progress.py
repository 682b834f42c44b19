"""How far the start of the runtime is: written by the threads that start it, read by the event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lorapool_api.protocol import StartupPhase, StartupReport

RATE_OVER_S = 15.0


class StartupProgress:
    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._phase = StartupPhase.FETCHING
        self._total_bytes: int | None = None
        self._seen: deque[tuple[float, int]] = deque([(now_s(), 0)])
        """(time, bytes on disk) of the last `RATE_OVER_S`, about once a second."""
        self._fetched_bytes = 0

    def begin_fetch(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes

    def fetched(self, on_disk_bytes: int) -> None:
        """Records how many bytes of the base are on disk."""
        now_s = self._now_s()
        if self._fetched_bytes == 0:  # what an earlier process has fetched is no part of the rate
            self._seen = deque([(now_s, on_disk_bytes)])
        self._fetched_bytes = on_disk_bytes
        if now_s - self._seen[-1][0] >= 1.0:
            self._seen.append((now_s, on_disk_bytes))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > RATE_OVER_S:
            self._seen.popleft()

    def begin_load(self) -> None:
        """The base's files are on disk."""
        self._phase = StartupPhase.LOADING

    def report(self) -> StartupReport:
        return StartupReport(
            phase=self._phase,
            fetched_bytes=self._fetched_bytes,
            total_bytes=self._total_bytes,
            bytes_per_s=self._bytes_per_s() if self._phase is StartupPhase.FETCHING else 0.0,
        )

    def _bytes_per_s(self) -> float:
        began_s, began_bytes = self._seen[0]
        seconds = self._now_s() - began_s
        return round(max(0, self._fetched_bytes - began_bytes) / seconds, 1) if seconds > 0 else 0.0
