"""From tokens to text that may be sent: whole characters only, and no part of a stop string.

The chunks of a `TextStream` joined are the decoding of all its tokens; where a chunk ends never changes what is sent.
Pure: no tokenizer library, only a `decode` function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

REPLACEMENT = "�"
MAX_PENDING_TOKENS = 16
"""A character takes at most 4 byte tokens: this many tokens that still end in U+FFFD will not become one."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Text of a growing list of tokens, held back while it ends in an incomplete character.

    Each step decodes a few tokens, not the whole answer: it starts at `_context`, a token whose text was sent already
    (decoders need it to place spaces), and takes the text that is new.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0
        self._sent = 0
        self.characters = 0
        """Characters returned so far: the offset at which the next token's text begins."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; often empty."""
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
        """The text still held back, with U+FFFD for an incomplete character."""
        before = self._decode(self._ids[self._context : self._sent])
        now = self._decode(self._ids[self._context :])
        return self._take(before, now)

    def _take(self, before: str, now: str) -> str:
        self._context, self._sent = self._sent, len(self._ids)
        # drop the tokens that are no longer needed as context, so that memory stays bounded
        del self._ids[: self._context]
        self._sent -= self._context
        self._context = 0
        self.characters += len(now) - len(before)
        return now[len(before) :]


class TextChunk(NamedTuple):
    """Text that may be sent, and whether a stop string ends the answer after it."""

    text: str
    stopped: bool = False


class StopFilter:
    """Cuts the answer before the stop string that is completed first; of two at once, before the longer one.

    With `included` it is cut after the stop string.
    """

    def __init__(self, stops: Sequence[str], *, included: bool = False) -> None:
        self._stops = tuple(stops)
        self._included = included
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def push(self, text: str) -> TextChunk:
        if not self._stops:
            return TextChunk(text)
        held = self._held + text
        cut = self._first_stop(held, known=len(self._held))
        if cut is not None:
            self._held = ""
            return TextChunk(held[: cut[0] if self._included else cut[1]], stopped=True)
        keep = self._possible_start(held)
        self._held = held[len(held) - keep :]
        return TextChunk(held[: len(held) - keep])

    def finish(self) -> str:
        """The text still held back: the answer ended before it became a stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str, *, known: int) -> tuple[int, int] | None:
        """End and start of the stop string that is completed first. None ends within the first `known` characters."""
        best: tuple[int, int] | None = None  # (end, start)
        for stop in self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                found = (start + len(stop), start)
                best = found if best is None else min(best, found)
        return best

    def _possible_start(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops if len(stop) > length):
                return length
        return 0


class TextStream:
    """A detokenizer followed by a stop filter: tokens in, text that may be sent out."""

    def __init__(self, decode: Decode, stops: Sequence[str], *, included: bool = False) -> None:
        self._detokenizer = Detokenizer(decode)
        self._filter = StopFilter(stops, included=included)

    @property
    def characters(self) -> int:
        """The offset at which the next token's text begins, before stop strings are cut."""
        return self._detokenizer.characters

    def push(self, token_id: int) -> TextChunk:
        return self._filter.push(self._detokenizer.push(token_id))

    def finish(self) -> TextChunk:
        """Ends the stream. The text still held back may complete a stop string."""
        chunk = self._filter.push(self._detokenizer.finish())
        if chunk.stopped:
            return chunk
        return TextChunk(chunk.text + self._filter.finish())


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """The decoded prompt that is part of the answer, with the offset at which each token begins."""

    text: str
    token_ids: tuple[int, ...]
    offsets: tuple[int, ...]


def echo_prompt(decode: Decode, token_ids: Sequence[int]) -> EchoedPrompt:
    """Decodes a prompt token by token. All tokens of one character have the offset of that character."""
    detokenizer, texts, offsets = Detokenizer(decode), [], []
    for token_id in token_ids:
        offsets.append(detokenizer.characters)
        texts.append(detokenizer.push(token_id))
    texts.append(detokenizer.finish())
    return EchoedPrompt("".join(texts), tuple(token_ids), tuple(offsets))
