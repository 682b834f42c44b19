"""JSON schemas of requests, checked before a grammar is made of them.

The bounds are on what determines the size of a grammar: bytes, nodes, and the alternatives that `allOf` of `anyOf`
multiplies. The meaning of a schema is left to the grammar library. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lorapool_api.openai import InvalidRequestError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_NODES = 5000
"""Objects, lists and items of lists."""
MAX_ALTERNATIVES = 1024
"""Alternatives at one node of a schema when every `allOf` is multiplied out; each becomes a grammar rule."""
MAX_PATTERN_CHARS = 1000
_OF_THE_LIBRARY = "x-guidance"


def checked_schema(value: Any, param: str) -> str:
    """The schema as compact JSON text. Raises InvalidRequestError naming `param` and the bound that is exceeded."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"`{param}` must be a JSON schema: an object.", param=param)
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES:
        raise _too_large(param, f"is longer than {MAX_SCHEMA_BYTES} bytes")
    for nodes, node in enumerate(_nodes(value), start=1):
        if nodes > MAX_SCHEMA_NODES:
            raise _too_large(param, f"has more than {MAX_SCHEMA_NODES} parts")
        if isinstance(node, dict):
            _check_keywords(node, param)
    if _Alternatives(value).most() > MAX_ALTERNATIVES:
        raise _too_large(param, f"multiplies out to more than {MAX_ALTERNATIVES} alternatives at one node")
    return text


def _too_large(param: str, why: str) -> InvalidRequestError:
    return InvalidRequestError(f"The schema in `{param}` {why}.", param=param, code="schema_too_large")


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nodes(inner)


def _check_keywords(node: dict[str, Any], param: str) -> None:
    if _OF_THE_LIBRARY in node:
        raise InvalidRequestError(
            f"`{_OF_THE_LIBRARY}` in `{param}` is not supported.", param=param, code="unsupported_schema"
        )
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise InvalidRequestError(
            f"`$ref` in `{param}` must point into the schema itself (`#/...`); other documents are not read.",
            param=param,
            code="unsupported_schema",
        )
    pattern = node.get("pattern")
    if isinstance(pattern, str) and len(pattern) > MAX_PATTERN_CHARS:
        raise _too_large(param, f"has a pattern of more than {MAX_PATTERN_CHARS} characters")


class _Alternatives:
    """Counts the alternatives at every node: `anyOf` and `oneOf` add them up, `allOf` multiplies them."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._counted: dict[int, int] = {}

    def most(self) -> int:
        return max((self._of(node) for node in _nodes(self._root) if isinstance(node, dict)), default=1)

    def _of(self, node: Any) -> int:
        if not isinstance(node, dict):
            return 1
        if id(node) not in self._counted:
            self._counted[id(node)] = 1  # a cycle of references adds no alternatives
            self._counted[id(node)] = min(self._product(node), MAX_ALTERNATIVES + 1)
        return self._counted[id(node)]

    def _product(self, node: dict[str, Any]) -> int:
        product = 1
        for part in _listed(node, "allOf"):
            product *= self._of(part)
        for keyword in ("anyOf", "oneOf"):
            product *= sum(self._of(part) for part in _listed(node, keyword)) or 1
        if isinstance(node.get("$ref"), str):
            product *= self._of(self._target(node["$ref"]))
        return product

    def _target(self, reference: str) -> Any:
        found: Any = self._root
        for step in reference.removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, dict) else None
        return found


def _listed(node: dict[str, Any], keyword: str) -> list[Any]:
    value = node.get(keyword)
    return value if isinstance(value, list) else []
