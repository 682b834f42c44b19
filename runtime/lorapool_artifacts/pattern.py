"""Matches regular expressions of users in bounded time.

peft settings name modules by such expressions. Python's own matcher backtracks: one expression of twenty characters
can occupy a process for hours. Here the expression becomes a nondeterministic finite automaton that is simulated with
sets of states (K. Thompson, CACM 11(6), 1968), and the sets are cached. Look-around, back-references and flags are
refused, because such an automaton cannot express them. Beyond a budget of work the result is None; the caller then
relies on the adapter's tensors or refuses the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

MAX_CHARS = 512
MAX_STATES = 4_000
MAX_WORK = 2_000_000
"""Visited states in all matches of one pattern together: less than a second of work."""

_MAX_DEPTH = 50
_CLASS_ESCAPES = frozenset("dDwWsS")
_ASSERTIONS = {"b": "b", "A": "^", "Z": "Z"}  # not \B: its meaning for empty text depends on the Python version
_CONTROL_ESCAPES = frozenset("nrtfva")
_REPEAT = re.compile(r"\{(\d*)(,?)(\d*)\}")

_END, _FINAL_NEWLINE, _WORD, _OTHER = range(4)  # the next character, as far as assertions depend on it


class PatternError(ValueError):
    """The text is not a regular expression, or it uses syntax that is not supported."""


@dataclass(frozen=True, slots=True)
class _Char:
    accepts: Callable[[str], object]
    next: int


@dataclass(slots=True)
class _Split:
    branches: list[int]


@dataclass(frozen=True, slots=True)
class _Assert:
    kind: str
    next: int


@dataclass(frozen=True, slots=True)
class _Match:
    pass


_State = _Char | _Split | _Assert | _Match
_Node = Callable[["_Builder", int], int]
"""Takes the number of the following state, adds its own states and returns the number of the first."""


class Pattern:
    """One compiled expression. Raises PatternError for syntax that is not supported."""

    def __init__(self, expression: str) -> None:
        if len(expression) > MAX_CHARS:
            raise PatternError(f"it is longer than {MAX_CHARS} characters")
        try:
            re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(str(error)) from error
        node = _Parser(expression).parse()
        self._builder = _Builder()
        self._start = node(self._builder, self._builder.add(_Match()))
        self._work = 0
        self._starts: dict[int, frozenset[int]] = {}
        self._moves: dict[tuple[frozenset[int], str, int], frozenset[int]] = {}

    def fullmatch(self, text: str) -> bool | None:
        """Whether the whole text matches; None once this pattern has used up its budget of work."""
        if self._work > MAX_WORK:
            return None
        ahead = _kind(text, 0)
        states = self._starts.get(ahead)
        if states is None:
            states = self._starts[ahead] = self._closure([self._start], "", ahead)
        for position, char in enumerate(text):
            ahead = _kind(text, position + 1)
            key = (states, char, ahead)
            following = self._moves.get(key)
            if following is None:
                if self._work > MAX_WORK:
                    return None
                following = self._moves[key] = self._closure(list(self._step(states, char)), char, ahead)
            states = following
        return any(isinstance(self._builder.states[state], _Match) for state in states)

    def _step(self, states: frozenset[int], char: str) -> Iterator[int]:
        for number in states:
            state = self._builder.states[number]
            if isinstance(state, _Char) and state.accepts(char):
                yield state.next

    def _closure(self, pending: list[int], behind: str, ahead: int) -> frozenset[int]:
        """All states reachable without reading a character; `behind` is the previous character, "" at the start."""
        seen: set[int] = set()
        while pending:
            number = pending.pop()
            if number in seen:
                continue
            seen.add(number)
            state = self._builder.states[number]
            if isinstance(state, _Split):
                pending += state.branches
            elif isinstance(state, _Assert) and _holds(state.kind, behind, ahead):
                pending.append(state.next)
        self._work += len(seen) + 1
        return frozenset(n for n in seen if isinstance(self._builder.states[n], _Char | _Match))


def _kind(text: str, position: int) -> int:
    if position >= len(text):
        return _END
    if text[position] == "\n" and position == len(text) - 1:
        return _FINAL_NEWLINE
    return _WORD if _is_word(text[position]) else _OTHER


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _holds(kind: str, behind: str, ahead: int) -> bool:
    match kind:
        case "^":
            return behind == ""
        case "$":
            return ahead in (_END, _FINAL_NEWLINE)
        case "Z":
            return ahead == _END
        case _:  # "b"
            return (behind != "" and _is_word(behind)) != (ahead == _WORD)


@dataclass(slots=True)
class _Builder:
    states: list[_State] = field(default_factory=list)

    def add(self, state: _State) -> int:
        if len(self.states) >= MAX_STATES:
            raise PatternError("it is too large")
        self.states.append(state)
        return len(self.states) - 1


class _Parser:
    """Recursive descent parser of expressions that Python's `re` has already accepted."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def parse(self) -> _Node:
        return self._alternatives(0)

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        self._at += 1
        return char

    def _alternatives(self, depth: int) -> _Node:
        if depth > _MAX_DEPTH:
            raise PatternError("its groups are nested too deeply")
        branches = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _either(branches)

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated(self._atom(depth)))
        return _in_a_row(parts)

    def _repeated(self, node: _Node) -> _Node:
        while (bounds := self._bounds()) is not None:
            if self._peek() == "+":
                raise PatternError("possessive repeats are not supported")
            if self._peek() == "?":
                self._at += 1  # lazy: changes which match is found first, not whether one exists
            node = _times(node, *bounds)
        return node

    def _bounds(self) -> tuple[int, int | None] | None:
        char = self._peek()
        if char in ("*", "+", "?"):
            self._at += 1
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        if char == "{" and (found := _REPEAT.match(self._text, self._at)) and (found[1] or found[2]):
            self._at = found.end()
            least = int(found[1] or 0)
            return least, (int(found[3]) if found[3] else None) if found[2] else least
        return None

    def _atom(self, depth: int) -> _Node:
        match char := self._take():
            case "(":
                return self._group(depth)
            case "[":
                return self._class()
            case ".":
                return _one(lambda c: c != "\n")
            case "^" | "$":
                return _assertion(char)
            case "\\":
                return self._escape()
            case _:
                return _one(char.__eq__)

    def _group(self, depth: int) -> _Node:
        if self._peek() == "?":
            found = re.compile(r"\?(?::|P<\w+>)").match(self._text, self._at)
            if found is None:
                raise PatternError("look-around, back-references and flags are not supported")
            self._at = found.end()
        node = self._alternatives(depth + 1)
        self._at += 1  # the closing parenthesis, whose presence `re` has checked
        return node

    def _class(self) -> _Node:
        begin = self._at - 1
        if self._peek() == "^":
            self._at += 1
        if self._peek() == "]":
            self._at += 1
        while self._take() != "]":
            if self._text[self._at - 1] == "\\":
                self._at += 1
        return _one(re.compile(self._text[begin : self._at]).fullmatch)  # one character: nothing to backtrack

    def _escape(self) -> _Node:
        char = self._take()
        if char in _ASSERTIONS:
            return _assertion(_ASSERTIONS[char])
        if char in _CLASS_ESCAPES or char in _CONTROL_ESCAPES:
            return _one(re.compile("\\" + char).fullmatch)
        if char.isalnum():
            raise PatternError(f"the escape \\{char} is not supported")
        return _one(char.__eq__)


def _one(accepts: Callable[[str], object]) -> _Node:
    return lambda builder, following: builder.add(_Char(accepts, following))


def _assertion(kind: str) -> _Node:
    return lambda builder, following: builder.add(_Assert(kind, following))


def _in_a_row(parts: list[_Node]) -> _Node:
    def build(builder: _Builder, following: int) -> int:
        for part in reversed(parts):
            following = part(builder, following)
        return following

    return build


def _either(branches: list[_Node]) -> _Node:
    return lambda builder, following: builder.add(_Split([branch(builder, following) for branch in branches]))


def _times(node: _Node, least: int, most: int | None) -> _Node:
    def build(builder: _Builder, following: int) -> int:
        if most is None:
            loop = _Split([following])
            again = builder.add(loop)
            loop.branches.append(node(builder, again))
            following = again
        for _ in range((most or least) - least):
            following = builder.add(_Split([following, node(builder, following)]))
        for _ in range(least):
            following = node(builder, following)
        return following

    return build
