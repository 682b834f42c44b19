"""How each minute of the process's life is used: time of the engine's steps and bytes on the device, by account.

Minutes are contiguous on the monotonic clock, whatever the wall clock does: it only names them. A step belongs to the
minute in which it began, and that minute lasts until the step has ended; so the steps of a minute never take longer
than the minute. What is open is in the running table too, for the next process if this one is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorapool_api.usage_protocol import MinuteLine
from lorapool_runtime.accounts.running_table import (
    LINE_BYTE_NS_HIGH,
    LINE_BYTE_NS_LOW,
    LINE_BYTES,
    LINE_GPU,
    LINE_SINCE_NS,
    LINES_USED,
    SIGN_NS,
    SIGN_UNIX_MS,
    RunningTable,
)
from lorapool_runtime.accounts.usage import AdapterUsage
from lorapool_runtime.clock import Clock

MINUTE_NS = 60 * 10**9
_ROUNDING_NS = 10**9
"""A minute that would be shorter than this is part of the next: the wall clock is not that exact."""
_LOW = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Minute:
    """One that has ended."""

    minute_unix_s: int
    uptime_ns: int
    busy_ns: int
    lines: list[MinuteLine]


@dataclass(slots=True)
class _Line:
    account: AdapterUsage
    at: int
    gpu_ns: int = 0
    byte_ns: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    """Bytes by digest."""
    since_ns: int = 0
    """Until when `byte_ns` is counted."""


class Minutes:
    def __init__(
        self, table: RunningTable, clock: Clock, *, started_ns: int, on_minute: Callable[[Minute], None]
    ) -> None:
        """`started_ns`: when the first minute begins, on the monotonic clock."""
        self._table, self._words = table, table.words
        self._clock = clock
        self._on_minute = on_minute
        self._lines: dict[str, _Line] = {}
        self._busy_ns = 0
        self._span_ns = self._ends_ns = self._minute_unix_s = 0
        self.frontier_ns = started_ns
        """Up to when everything is known: no step that is reported later began before it."""
        self._open(started_ns, [])

    # --- what happens ---

    def sign_of_life(self, now_ns: int) -> None:
        """Proves that the process lives, for the next one."""
        self._words[SIGN_NS] = now_ns
        self._words[SIGN_UNIX_MS] = self._clock.unix_ms()

    def step(self, began_ns: int, ended_ns: int, shares: Sequence[tuple[AdapterUsage, int]]) -> None:
        """Counts a step of the engine: the time of each account in it, all together its duration."""
        self.close_until(began_ns)
        words = self._words
        if self._table.lines - words[LINES_USED] < len(shares):  # the minute might not have a line for each
            self._close(self.frontier_ns)
        lines = self._lines
        for account, ns in shares:
            line = lines.get(account.uid) or self._line(account, began_ns)
            line.gpu_ns += ns
            words[line.at + LINE_GPU] = line.gpu_ns
            self._busy_ns += ns
        self.frontier_ns = max(ended_ns, self.frontier_ns)
        self.sign_of_life(ended_ns)
        if ended_ns >= self._ends_ns:
            self._close(ended_ns)

    def loaded(self, account: AdapterUsage, digest: str, device_bytes: int, now_ns: int) -> None:
        """`now_ns`: not after `frontier_ns` while a step may run."""
        line = self._line(account, now_ns)
        self._count_bytes(line, now_ns)
        line.resident[digest] = device_bytes
        self._store_bytes(line)

    def unloaded(self, uid: str, digest: str, now_ns: int) -> None:
        if (line := self._lines.get(uid)) is not None:
            self._count_bytes(line, now_ns)
            line.resident.pop(digest, None)
            self._store_bytes(line)

    def close_until(self, now_ns: int) -> None:
        """Ends the minutes that are over at a time at which no step runs."""
        self.frontier_ns = max(now_ns, self.frontier_ns)
        while now_ns >= self._ends_ns:
            self._close(self._ends_ns)

    def end(self, now_ns: int) -> None:
        """Ends the last minute."""
        self.close_until(now_ns)
        self._close(max(now_ns, self.frontier_ns))

    # --- one minute ---

    def _line(self, account: AdapterUsage, now_ns: int) -> _Line:
        if (line := self._lines.get(account.uid)) is not None:
            return line
        texts = (account.uid, account.display)
        if (at := self._table.take_line(texts)) is None:  # more accounts than a minute has lines: it ends early
            self._close(self.frontier_ns)
            at = self._table.take_line(texts)
            assert at is not None
        line = self._lines[account.uid] = _Line(account, at, since_ns=now_ns)
        return line

    def _count_bytes(self, line: _Line, now_ns: int) -> None:
        now_ns = max(now_ns, line.since_ns)
        line.byte_ns += sum(line.resident.values()) * (now_ns - line.since_ns)
        line.since_ns = now_ns

    def _store_bytes(self, line: _Line) -> None:
        words, at = self._words, line.at
        words[at + LINE_BYTES] = 0  # while these do not belong together, the bytes so far are too few, never too many
        words[at + LINE_BYTE_NS_HIGH], words[at + LINE_BYTE_NS_LOW] = line.byte_ns >> 64, line.byte_ns & _LOW
        words[at + LINE_SINCE_NS] = line.since_ns
        words[at + LINE_BYTES] = sum(line.resident.values())

    def _close(self, at_ns: int) -> None:
        for line in self._lines.values():
            self._count_bytes(line, at_ns)
        used = [line for line in self._lines.values() if line.gpu_ns or line.byte_ns]
        lines = [
            MinuteLine(uid=line.account.uid, model=line.account.display, gpu_ns=line.gpu_ns, byte_ns=line.byte_ns)
            for line in used
        ]
        self._on_minute(Minute(self._minute_unix_s, at_ns - self._span_ns, self._busy_ns, lines))
        self._open(at_ns, [line for line in self._lines.values() if line.resident])

    def _open(self, at_ns: int, resident: list[_Line]) -> None:
        unix_ns = self._clock.unix_ns() - (self._clock.now_ns() - at_ns)
        left_ns = MINUTE_NS - unix_ns % MINUTE_NS
        if left_ns < _ROUNDING_NS:
            unix_ns += left_ns
            left_ns += MINUTE_NS
        self._span_ns, self._ends_ns = at_ns, at_ns + left_ns
        self._minute_unix_s = unix_ns // MINUTE_NS * 60
        self._busy_ns = 0
        self._lines = {}
        self._table.begin_minute(span_ns=at_ns, minute_unix_s=self._minute_unix_s)
        for old in resident:
            line = self._line(old.account, at_ns)
            line.resident = old.resident
            self._store_bytes(line)
