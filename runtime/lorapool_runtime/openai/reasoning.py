"""Separates an answer's reasoning, in `<think>` tags at its beginning, from what it says. Pure.

A template that knows the tags either writes `<think>` itself, so that the answer begins inside of it, or lets the model
write it, or closes the tags for an answer without reasoning; the end of the prompt shows which.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

BEGIN, END = "<think>", "</think>"


class ReasoningStart(Enum):
    """How an answer may begin."""

    NONE = "none"
    """Without reasoning: the tags are text like any other."""
    MAYBE = "maybe"
    """With `<think>`, if it has reasoning."""
    INSIDE = "inside"
    """With reasoning: the prompt has the `<think>`."""


def reasoning_start(prompt: str, *, continues: bool) -> ReasoningStart:
    """How the answer to a rendered prompt may begin. `continues`: it continues the prompt's last message."""
    end = prompt.rstrip()
    if end.endswith(BEGIN) or (continues and prompt.rfind(BEGIN) > prompt.rfind(END)):
        return ReasoningStart.INSIDE
    return ReasoningStart.NONE if end.endswith(END) or continues else ReasoningStart.MAYBE


def split_reasoning(text: str) -> tuple[str, str]:
    """The reasoning and the rest of a whole answer as a model writes it."""
    reader = ReasoningReader(ReasoningStart.MAYBE)
    parts = [reader.push(text), reader.finish()]
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts)


class Piece(NamedTuple):
    reasoning: str
    content: str


class ReasoningReader:
    """Reads an answer in pieces, however it is split. White space next to the tags belongs to neither side."""

    def __init__(self, start: ReasoningStart) -> None:
        self._state = start
        self._held = ""
        self._begun = False
        """Whether a part of the reasoning, or of the content after it, was returned: white space before it is not."""
        self._trims = False
        self.tokens = 0
        """How many tokens of the answer its reasoning has so far, with the tags."""

    def push(self, text: str, tokens: int = 0) -> Piece:
        """Reads the next text, up to which the answer has so many tokens."""
        if self._state is ReasoningStart.INSIDE:
            self.tokens = tokens
        found = self._push(text)
        if self._state is ReasoningStart.INSIDE or found.reasoning:
            self.tokens = tokens
        return found

    def _push(self, text: str) -> Piece:
        self._held += text
        if self._state is ReasoningStart.MAYBE and not self._decide():
            return Piece("", "")
        if self._state is ReasoningStart.INSIDE:
            return self._inside()
        return Piece("", self._rest())

    def finish(self) -> Piece:
        """What is still held back at the end of the answer."""
        held, self._held = self._held, ""
        if self._state is ReasoningStart.INSIDE:
            return Piece(held.rstrip() if self._begun else held.strip(), "")
        return Piece("", held)

    def _decide(self) -> bool:
        """Whether it is known if the answer begins with the tag."""
        start = self._held.lstrip()
        if start.startswith(BEGIN):
            self._held, self._state = start[len(BEGIN) :], ReasoningStart.INSIDE
            return True
        if BEGIN.startswith(start):
            return False
        self._state = ReasoningStart.NONE
        return True

    def _inside(self) -> Piece:
        """What is certain; what may be the tag, and white space before it, is held back."""
        at = self._held.find(END)
        if at >= 0:
            found, self._held = self._held[:at].rstrip(), self._held[at + len(END) :]
            found = found if self._begun else found.lstrip()
            self._state, self._begun, self._trims = ReasoningStart.NONE, False, True
            return Piece(found, self._rest())
        if not self._begun:
            self._held = self._held.lstrip()
        keep = len(self._held) - len(_before_tag(self._held).rstrip())
        found, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._begun = self._begun or bool(found)
        return Piece(found, "")

    def _rest(self) -> str:
        held, self._held = self._held, ""
        if self._trims:
            held = held.lstrip()
            self._trims = not held
        return held


def _before_tag(text: str) -> str:
    """The text without an end that may become the closing tag."""
    length = next((n for n in range(min(len(END) - 1, len(text)), 0, -1) if text.endswith(END[:n])), 0)
    return text[: len(text) - length]
