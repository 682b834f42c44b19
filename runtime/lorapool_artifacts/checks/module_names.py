"""Matches modules with a setting of peft: a name, the end of a name, or a regular expression.

A large base has thousands of modules, so names are looked up in a table and expressions run in linear time. A dot in
a plain name is a literal dot. The result is None for an expression that `pattern` cannot match: callers must not
guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from lorapool_artifacts.checks.pattern import Pattern, PatternError

MAX_EXPRESSIONS = 256
"""Regular expressions in one rank_pattern or alpha_pattern; the number of plain names is not limited."""

_PLAIN = re.compile(r"^\^?[A-Za-z0-9_.]{1,256}$")


def endings(module: str) -> Iterator[str]:
    """The name and all its endings, such as `a.b.c`, `b.c` and `c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


class Names:
    """target_modules or exclude_modules: a list of names and endings, or one expression that matches whole names."""

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
        """Whether the list contains the module's full name."""
        return module in self._names

    def match(self, module: str) -> bool | None:
        """Whether the setting matches the module; None when that cannot be decided."""
        if self._unknown:
            return None
        if self._pattern is not None:
            return self._pattern.fullmatch(module)
        return any(ending in self._names for ending in endings(module))


class PerModule:
    """rank_pattern or alpha_pattern, by peft's rule: the first key that equals or matches the module's name or an
    ending of it counts; `^` anchors a key at the start.

    Raises PatternError for an expression that cannot be matched.
    """

    def __init__(self, patterns: Mapping[str, float]) -> None:
        self._named: dict[str, tuple[int, float]] = {}
        self._anchored: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, Pattern, float]] = []
        for order, (key, value) in enumerate(patterns.items()):
            if _PLAIN.match(key):
                (self._anchored if key.startswith("^") else self._named)[key.removeprefix("^")] = (order, value)
                continue
            if len(self._expressions) == MAX_EXPRESSIONS:
                raise PatternError(f"there are more than {MAX_EXPRESSIONS} expressions, a bound of Lorapool's own")
            Pattern(key)  # checked by itself: it must not close the group into which it is put
            self._expressions.append((order, Pattern(rf"(?:.*\.)?(?:{key})"), value))

    def value(self, module: str) -> float | None:
        """The module's value, or None when no key matches. Raises PatternError when that cannot be decided."""
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
                raise PatternError("the name is not plain text")
            if matches:
                return value
        return None if best is None else best[1]
