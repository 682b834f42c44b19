"""JSON schemas without the keywords that the grammar library cannot enforce, for tools that are not strict. Pure.

There is no list of such keywords: the library is asked about each node of a schema and, where it refuses one, about
each keyword of the node alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lorapool_runtime.openai.tools.json_schema import (
    ANNOTATIONS,
    LISTS,
    MAPS,
    SINGLES,
    Path,
    Schema,
    rewritten,
)

Fails = Callable[[Schema], bool]
"""Whether the library refuses a schema."""

_STRUCTURE = frozenset({*LISTS, *SINGLES, "$defs", "definitions", "properties", "$ref", "type", "enum", "const"})
_KEPT = _STRUCTURE | ANNOTATIONS | {"required"}
_UNSAFE = re.compile(r"[^!-+\--~]")
"""Characters that are not visible ASCII, and the comma."""
MAX_HEADER_CHARS = 1000
_CONTEXT = ("type", "properties", "required", "additionalProperties")
"""Keywords on which it depends whether another one of the node can be enforced."""


def relaxed(schema: Schema, fails: Fails) -> tuple[Schema, tuple[str, ...]]:
    """The schema without what cannot be enforced, and the paths of what was left out."""
    dropped: list[str] = []

    def keep_enforceable(node: Schema, path: Path) -> Schema:
        bad = _unenforceable(node, fails)
        dropped.extend(".".join((*path, keyword)) for keyword in bad)
        return {keyword: value for keyword, value in node.items() if keyword not in bad}

    def accept_any_alternative(node: Schema, path: Path) -> Schema:
        if "oneOf" not in node:
            return node
        dropped.append(".".join((*path, "oneOf")))
        others = {keyword: value for keyword, value in node.items() if keyword != "oneOf"}
        return {**others, "allOf": [*node.get("allOf", ()), {"anyOf": node["oneOf"]}]}

    made = rewritten(schema, keep_enforceable)
    if fails(made):  # the library enforces oneOf only where it can prove that the alternatives exclude each other
        made = rewritten(made, accept_any_alternative)
    return made, tuple(dropped)


def _unenforceable(node: Schema, fails: Fails) -> list[str]:
    candidates = [keyword for keyword in node if keyword not in _KEPT]
    if not candidates or not fails(_shallow(node)):
        return []
    context = {keyword: node[keyword] for keyword in _CONTEXT if keyword in node}
    bad = [keyword for keyword in candidates if fails(_shallow({**context, keyword: node[keyword]}))]
    return bad or candidates  # each alone is fine: together they are not


def _shallow(node: Schema) -> Schema:
    """The node with schemas that permit anything in place of those within it."""
    return {keyword: _emptied(keyword, value) for keyword, value in node.items() if keyword not in LISTS | {"$ref"}}


def _emptied(keyword: str, value: Any) -> Any:
    if keyword in MAPS and isinstance(value, Mapping):
        return {} if keyword in ("$defs", "definitions") else {name: {} for name in value}
    if keyword in SINGLES and isinstance(value, Mapping):
        return {}
    return value


def header_value(paths: Sequence[str]) -> str:
    """The paths as the value of a header: a list with commas, cut to MAX_HEADER_CHARS."""
    return ", ".join(_UNSAFE.sub("?", path) for path in paths)[:MAX_HEADER_CHARS]
