"""Which modules a setting of peft means: by name, by the end of a name, or by a regular expression.

`adapter_config` asks, for every module of a base, thousands in a large one; so names are looked up, never compared
one by one, and expressions run in bounded time. A dot in a plain name is a dot. Where an expression is beyond
`pattern`, the answer is None: the caller must not guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lorapool_artifacts.pattern import Pattern, PatternError

MAX_EXPRESSIONS = 64
"""In one rank_pattern or alpha_pattern; plain names are not bounded."""

_PLAIN = re.compile(r"^\^?[A-Za-z0-9_.]{1,256}$")


def endings(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


class Names:
    """target_modules or exclude_modules: a list of names and ends of names, or one expression for whole names."""

    def __init__(self, given: Sequence[str] | str) -> None:
        self._names = frozenset(() if isinstance(given, str) else given)
        self._pattern: Pattern | None = None
        self._unknown = False
        if isinstance(given, str) and given:
            try:
                self._pattern = Pattern(given)
            except PatternError:
                self._unknown = True

    def whole(self, module: str) -> bool:
        """Named by its full name."""
        return module in self._names

    def match(self, module: str) -> bool | None:
        if self._unknown:
            return None
        if self._pattern is not None:
            return self._pattern.fullmatch(module)
        return any(ending in self._names for ending in endings(module))


class PerModule:
    """rank_pattern or alpha_pattern. peft's rule: the first key that is the module's name or its end, or matches
    either as an expression; `^` anchors at the start. Raises PatternError for expressions that cannot be matched."""

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self._named: dict[str, tuple[int, float]] = {}
        self._anchored: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, Pattern, float]] = []
        for order, (key, value) in enumerate(patterns.items()):
            if _PLAIN.match(key):
                (self._anchored if key.startswith("^") else self._named)[key.removeprefix("^")] = (order, value)
                continue
            if len(self._expressions) == MAX_EXPRESSIONS:
                raise PatternError(f"there are more than {MAX_EXPRESSIONS} expressions")
            Pattern(key)  # by itself: it must not close the group it is put into
            self._expressions.append((order, Pattern(rf"(?:.*\.)?(?:{key})$\n?"), value))

    def value(self, module: str) -> float | None:
        """None: no key matches. Raises PatternError when that cannot be told."""
        if not (self._named or self._anchored or self._expressions):
            return None
        found = [self._named[ending] for ending in endings(module) if ending in self._named]
        if module in self._anchored:
            found.append(self._anchored[module])
        best = min(found, default=None)
        for order, pattern, value in self._expressions:
            if best is not None and best[0] < order:
                break
            matches = pattern.fullmatch(module)
            if matches is None:
                raise PatternError("an expression takes too long to match")
            if matches:
                return value
        return None if best is None else best[1]
