"""Reads tool calls from an answer's text, however it is split into chunks.

Text that may become a call is held back until it is one. A call that is never completed (cut off by `max_tokens`, or
not valid JSON) is returned as text, so that nothing is lost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from lorapool_runtime.openai.tool_format import ToolFormat

_DECODER = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ToolCall:
    name: str
    arguments: str
    """JSON text as the model wrote it."""


class ToolCallReader:
    def __init__(self, style: ToolFormat) -> None:
        self._style = style
        self._held = ""
        self._called = False

    def push(self, text: str) -> list[str | ToolCall]:
        """The text and the complete calls that are certain now, in order."""
        self._held += text
        parts: list[str | ToolCall] = []
        while self._held:
            at = self._held.find(self._style.trigger)
            if at < 0:
                keep = _overlap(self._held, self._style.trigger)
                self._release(parts, len(self._held) - keep)
                break
            self._release(parts, at)
            taken = self._call()
            if taken is None:
                break
            call, length = taken
            if call is None:
                self._release(parts, length)
            else:
                parts.append(call)
                self._called = True
                self._held = self._held[length:]
        return parts

    def finish(self) -> list[str | ToolCall]:
        """The text still held back at the end of the answer."""
        held, self._held = self._held, ""
        return [held] if held and not (self._called and held.isspace()) else []

    def _release(self, parts: list[str | ToolCall], length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text and not (self._called and text.isspace()):  # white space between calls is not part of the answer
            parts.append(text)

    def _call(self) -> tuple[ToolCall | None, int] | None:
        """(call, length) if `_held` begins with a call, (None, length) if with other text, None if incomplete."""
        style, held = self._style, self._held
        not_a_call = (None, len(style.trigger))
        if not held.startswith(style.opening):
            return None if style.opening.startswith(held) else not_a_call
        at = held.find(style.middle, len(style.opening))
        if at < 0:
            return None
        name, begin = held[len(style.opening) : at], at + len(style.middle)
        try:
            _, end = _DECODER.raw_decode(held, begin)
        except ValueError:
            return None
        if not held.startswith(style.closing, end):
            return None if style.closing.startswith(held[end:]) else not_a_call
        return ToolCall(name, held[begin:end]), end + len(style.closing)


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `trigger`."""
    return next((n for n in range(min(len(trigger) - 1, len(text)), 0, -1) if trigger.startswith(text[-n:])), 0)
