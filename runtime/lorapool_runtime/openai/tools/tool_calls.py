"""Reads tool calls from an answer's text while it is generated, however it is split into chunks.

Text that may become a call is held back until its name is known; from then on it is one, and its arguments are passed
on as they arrive. Arguments that `max_tokens` cuts off remain a call, as with OpenAI. Every character is looked at a
bounded number of times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from lorapool_runtime.openai.tools.tool_format import ToolFormat

MAX_NAME_CHARS = 256
_IN_STRING = re.compile(r'[^"\\]*')
_OUTSIDE = re.compile(r'[^"{}\[\]]*')


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """The next part of a call."""

    index: int
    """Number of the call within the answer."""
    name: str | None = None
    """With the first part of a call only."""
    arguments: str = ""
    """JSON text as the model wrote it."""


class JsonObjectScanner:
    """Finds the end of a JSON object in text that arrives in pieces. It does not check that the JSON is valid."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def scan(self, text: str) -> int | None:
        """The number of characters up to the object's end; None if all belong to it and it has not ended."""
        at = 0
        while at < len(text):
            if self._escaped:
                self._escaped = False
                at += 1
                continue
            skipped = (_IN_STRING if self._in_string else _OUTSIDE).match(text, at)
            at = skipped.end() if skipped else at
            if at < len(text):
                self._take(text[at])
                at += 1
                if self._depth == 0:
                    return at
        return None

    def _take(self, character: str) -> None:
        if self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        else:
            self._depth += 1 if character in "{[" else -1


class _State(Enum):
    TEXT = auto()
    NAME = auto()
    """Begins as a call; its name is not complete."""
    ARGUMENTS = auto()
    CLOSING = auto()


class ToolCallReader:
    def __init__(self, style: ToolFormat) -> None:
        self._style = style
        self._held = ""
        self._state = _State.TEXT
        self._scanner = JsonObjectScanner()
        self._calls = 0

    def push(self, text: str) -> list[str | ToolCallDelta]:
        """The text and the parts of calls that are certain now, in order."""
        self._held += text
        parts: list[str | ToolCallDelta] = []
        while self._held and self._advance(parts):
            pass
        return parts

    def finish(self) -> list[str | ToolCallDelta]:
        """The text still held back at the end of the answer."""
        held, self._held = self._held, ""
        unwritten = self._state is _State.CLOSING or (self._calls and held.isspace())
        return [held] if held and not unwritten else []

    def _advance(self, parts: list[str | ToolCallDelta]) -> bool:
        """Takes what is certain from the held text; false if more is needed."""
        match self._state:
            case _State.TEXT:
                return self._text(parts)
            case _State.NAME:
                return self._name(parts)
            case _State.ARGUMENTS:
                return self._arguments(parts)
            case _State.CLOSING:
                return self._closing()

    def _text(self, parts: list[str | ToolCallDelta]) -> bool:
        at = self._held.find(self._style.trigger)
        if at < 0:
            self._release(parts, len(self._held) - _overlap(self._held, self._style.trigger))
            return False
        self._release(parts, at)
        self._state = _State.NAME
        return True

    def _release(self, parts: list[str | ToolCallDelta], length: int) -> None:
        text, self._held = self._held[:length], self._held[length:]
        if text and not (self._calls and text.isspace()):  # white space between calls is not part of the answer
            parts.append(text)

    def _name(self, parts: list[str | ToolCallDelta]) -> bool:
        style, begin = self._style, len(self._style.opening)
        at = self._held.find(style.middle, begin, begin + MAX_NAME_CHARS)
        arguments = at + len(style.middle)
        if self._is_undecided(at, arguments):
            return False
        self._state = _State.TEXT
        if at < 0 or not self._held.startswith(style.opening) or self._held[arguments] != "{":
            self._release(parts, len(style.trigger))  # other text begins as a call does
            return True
        parts.append(ToolCallDelta(self._calls, self._held[begin:at]))
        self._held = self._held[arguments:]
        self._scanner = JsonObjectScanner()
        self._state = _State.ARGUMENTS
        return True

    def _is_undecided(self, at: int, arguments: int) -> bool:
        """Whether more text decides if this is a call. `at`: the end of its name, -1 if that has not arrived."""
        opening, held = self._style.opening, self._held
        if not held.startswith(opening):
            return opening.startswith(held)
        return len(held) < len(opening) + MAX_NAME_CHARS if at < 0 else arguments == len(held)

    def _arguments(self, parts: list[str | ToolCallDelta]) -> bool:
        end = self._scanner.scan(self._held)
        arguments = self._held[:end]
        self._held = "" if end is None else self._held[end:]
        parts.append(ToolCallDelta(self._calls, arguments=arguments))
        if end is not None:
            self._calls += 1
            self._state = _State.CLOSING
        return True

    def _closing(self) -> bool:
        closing = self._style.closing
        if len(self._held) < len(closing) and closing.startswith(self._held):
            return False
        self._held = self._held.removeprefix(closing)
        self._state = _State.TEXT
        return True


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `trigger`."""
    return next((n for n in range(min(len(trigger) - 1, len(text)), 0, -1) if trigger.startswith(text[-n:])), 0)
