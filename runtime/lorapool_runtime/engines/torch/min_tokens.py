"""The constraint of `min_tokens`: no end token before so many tokens."""

from __future__ import annotations

from collections.abc import Iterable


class MinTokens:
    """A `TokenConstraint` of one sequence, which permits the stop tokens only after `least` tokens."""

    def __init__(self, least: int, stop_token_ids: Iterable[int], vocab_size: int) -> None:
        self._left = least
        self._any = b"\xff" * (-(-vocab_size // 8))
        before = bytearray(self._any)
        for token_id in stop_token_ids:
            before[token_id // 8] &= ~(1 << token_id % 8) & 0xFF
        self._no_end = bytes(before)

    def mask(self) -> bytes:
        return self._no_end if self._left > 0 else self._any

    def accept(self, token_id: int) -> None:
        self._left -= 1

    @property
    def complete(self) -> bool:
        return False
