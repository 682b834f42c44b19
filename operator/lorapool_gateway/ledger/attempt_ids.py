"""Identifiers of attempts: UUIDs of version 7 (RFC 9562), which sort by the order in which they were made. Pure."""

from __future__ import annotations

import os

_COUNTER_MAX = 0xFFF
_RANDOM_CHARS = 15
_POOL_BYTES = 960
"""Random bytes that one call of the system gives, for 128 identifiers."""


class AttemptIds:
    """Makes identifiers that never decrease, also when the clock is set back.

    They end in 60 random bits, so that a caller who knows one cannot guess another.
    """

    def __init__(self) -> None:
        self._last_ms = 0
        self._counter = 0
        self._time = ""
        self._pool = ""
        self._at = 0

    def next(self, now_ms: int) -> str:
        """The next identifier, in the usual form of 36 characters. `now_ms` is the Unix time in milliseconds."""
        if now_ms > self._last_ms:
            self._begin(now_ms)
        elif self._counter < _COUNTER_MAX:
            self._counter += 1
        else:
            self._begin(self._last_ms + 1)
        at = self._at
        if at + _RANDOM_CHARS > len(self._pool):
            self._pool, at = os.urandom(_POOL_BYTES).hex(), 0
        self._at = at + _RANDOM_CHARS
        return f"{self._time}{self._counter:03x}-8{self._pool[at : at + 3]}-{self._pool[at + 3 : self._at]}"

    def _begin(self, ms: int) -> None:
        self._last_ms, self._counter = ms, 0
        text = f"{ms:012x}"
        self._time = f"{text[:8]}-{text[8:]}-7"
