"""Matches regular expressions of adapters in linear time.

peft settings name modules by such expressions, and peft matches them with Python's `re`, which backtracks: one
expression of twenty characters can occupy a process for hours. RE2 compiles the expression to an automaton. It has no
look-around and no back-references, and it gives some syntax another meaning; such an expression is refused here, and
the caller relies on the adapter's tensors instead.
"""

from __future__ import annotations

import re

import re2

MAX_CHARS = 65_536
"""A bound of ours; the longest expressions that trainers write have some thousand characters."""

_ASCII = re.compile(r"[\x20-\x7e]*")
_OTHER_MEANING = re.compile(r"\{,|\[:|\\[0-9]|[^\x20-\x7e]")
"""Syntax that both engines accept, but do not read alike, such as `x{,3}`; and text beyond ASCII."""


class PatternError(ValueError):
    """The text is not a regular expression, or RE2 cannot match it as Python does."""


class Pattern:
    """One compiled expression. Raises PatternError for syntax that RE2 cannot match as Python does."""

    def __init__(self, expression: str) -> None:
        if len(expression) > MAX_CHARS:
            raise PatternError(f"it is longer than {MAX_CHARS} characters, a bound of Lorapool's own")
        if found := _OTHER_MEANING.search(expression):
            raise PatternError(f"{found[0]!a} is not supported")
        try:
            re.compile(expression)
            self._compiled = re2.compile(expression, _options())
        except (re.error, re2.error, OverflowError, RecursionError) as error:
            raise PatternError(_words_of(error)) from error

    def fullmatch(self, text: str) -> bool | None:
        """Whether the whole text matches; None for text beyond printable ASCII, which the engines read differently."""
        if not _ASCII.fullmatch(text):
            return None
        return self._compiled.fullmatch(text) is not None


def _options() -> re2.Options:
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    return options


def _words_of(error: Exception) -> str:
    """The engine's message; re2's is in bytes."""
    first = error.args[0] if error.args else error
    return first.decode(errors="replace") if isinstance(first, bytes) else str(first)
