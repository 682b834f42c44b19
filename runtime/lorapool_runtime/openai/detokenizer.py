"""From tokens to text that may be sent: whole characters only, and nothing of a stop string.

`generation` feeds one `TextStream` per sequence. Pieces joined are the whole decoding; where a chunk
ends never changes what is sent. Pure: no tokenizer library, only a `decode` function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

REPLACEMENT = "�"
MAX_PENDING_TOKENS = 16
"""A character takes at most 4 byte tokens; so many tokens that still end in U+FFFD are no character to come."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of a growing list of tokens, held back while its end is half a character.

    Decoding starts at `_context` (text already sent, which decoders need to place spaces) and what is
    new behind it is taken: each step decodes a few tokens, not the whole answer.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._sent = 0
        self.characters = 0
        """Of all the text handed out so far: where the next token's text begins."""

    def push(self, token_id: int) -> str:
        """The text that became certain with this token, often empty."""
        self._ids.append(token_id)
        pending = len(self._ids) - self._sent
        before = self._decode(self._ids[self._context : self._sent])
        now = self._decode(self._ids[self._context :])
        if len(now) <= len(before):
            return ""
        if now.endswith(REPLACEMENT) and pending < MAX_PENDING_TOKENS:
            return ""
        return self._take(before, now)

    def finish(self) -> str:
        """What is still held back, with U+FFFD where bytes are missing for good."""
        before = self._decode(self._ids[self._context : self._sent])
        now = self._decode(self._ids[self._context :])
        return self._take(before, now)

    def _take(self, before: str, now: str) -> str:
        self._context, self._sent = self._sent, len(self._ids)
        # forget what is no longer needed as context: memory stays flat
        del self._ids[: self._context]
        self._sent -= self._context
        self._context = 0
        self.characters += len(now) - len(before)
        return now[len(before) :]


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be sent, and whether a stop string ended the answer behind it."""

    text: str
    stopped: bool = False


class StopFilter:
    """Cuts the answer before the stop string that is complete first (of two at once, the longer one)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def push(self, text: str) -> Piece:
        if not self._stops:
            return Piece(text)
        held = self._held + text
        cut = self._first_stop(held, known=len(self._held))
        if cut is not None:
            self._held = ""
            return Piece(held[:cut], stopped=True)
        keep = self._possible_start(held)
        self._held = held[len(held) - keep :]
        return Piece(held[: len(held) - keep])

    def finish(self) -> str:
        """The answer ended: what looked like the start of a stop string was none."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str, *, known: int) -> int | None:
        """Where the stop string that is complete first begins; none ends within the `known` characters."""
        best: tuple[int, int] | None = None  # (end, start)
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start)
                best = found if best is None else min(best, found)
        return None if best is None else best[1]

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops if len(stop) > length):
                return length
        return 0


class TextStream:
    """Tokens in, sendable text out: a detokenizer with a stop filter behind it."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._filter = StopFilter(stops)

    @property
    def characters(self) -> int:
        """Where the next token's text begins, a stop string not cut off."""
        return self._detokenizer.characters

    def push(self, token_id: int) -> Piece:
        return self._filter.push(self._detokenizer.push(token_id))

    def finish(self) -> Piece:
        """The end without a stop string so far; the last held text may still complete one."""
        piece = self._filter.push(self._detokenizer.finish())
        if piece.stopped:
            return piece
        return Piece(piece.text + self._filter.finish())


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt as it is told back: its text, and where in it each token begins."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]


def echoed(decode: Decode, token_ids: Sequence[int]) -> EchoedPrompt:
    """Decodes a prompt token by token; half a character begins where the whole one does."""
    detokenizer, texts, offsets = Detokenizer(decode), [], []
    for token_id in token_ids:
        offsets.append(detokenizer.characters)
        texts.append(detokenizer.push(token_id))
    texts.append(detokenizer.finish())
    return EchoedPrompt("".join(texts), tuple(token_ids), tuple(offsets))
