"""JSON schemas of requests, checked and closed before a grammar is made of them.

The bounds are on what determines the size of a grammar: bytes, nodes, and the alternatives that `allOf` of `anyOf`
multiplies. An object that names its properties has no others unless `additionalProperties` is given: a model left free
invents some endlessly. All other meaning of a schema is left to the grammar library. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorapool_api.openai import InvalidRequestError

MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_NODES = 5000
"""Objects, lists and items of lists."""
MAX_ALTERNATIVES = 1024
"""Alternatives at one node of a schema when every `allOf` is multiplied out; each becomes a grammar rule."""
MAX_PATTERN_CHARS = 1000
_OF_THE_LIBRARY = "x-guidance"

Schema = dict[str, Any]
Path = tuple[str, ...]

MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
SINGLES = frozenset({"items", "additionalItems", "additionalProperties"})
ANNOTATIONS = frozenset(
    {
        "$anchor", "$comment", "$defs", "$id", "$schema", "contentEncoding", "contentMediaType", "default",
        "definitions", "deprecated", "description", "examples", "id", "readOnly", "title", "writeOnly",
    }
)  # fmt: skip
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref")
_VALUES = frozenset({"const", "default"})
"""Keywords whose null is a value. The null of any other one means that it is not given."""


def checked_schema(value: Any, param: str) -> str:
    """The schema as compact JSON text, its objects closed.

    Raises InvalidRequestError naming `param` and the bound that is exceeded.
    """
    if not isinstance(value, dict):
        raise InvalidRequestError(f"`{param}` must be a JSON schema: an object.", param=param)
    _check_bounds(value, param)
    return json.dumps(closed(value), ensure_ascii=False, separators=(",", ":"))


def _check_bounds(value: Schema, param: str) -> None:
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


def rewritten(node: Any, change: Callable[[Schema, Path], Schema], path: Path = ()) -> Any:
    """The schema with each node replaced by `change(node, path)`, the inner ones first."""
    if not isinstance(node, dict):
        return node
    own = {keyword: _rewritten_value(keyword, value, change, (*path, keyword)) for keyword, value in node.items()}
    return change(own, path)


def _rewritten_value(keyword: str, value: Any, change: Callable[[Schema, Path], Schema], path: Path) -> Any:
    if keyword in MAPS and isinstance(value, dict):
        return {name: rewritten(inner, change, (*path, name)) for name, inner in value.items()}
    if isinstance(value, list) and (keyword in LISTS or keyword == "items"):
        return [rewritten(inner, change, (*path, str(place))) for place, inner in enumerate(value)]
    return rewritten(value, change, path) if keyword in SINGLES else value


def closed(schema: Schema) -> Schema:
    """The schema with `additionalProperties: false` in each object that lists its properties and leaves it open.

    An object that is merged with another schema (`allOf`, or a reference with further keywords) stays as it is: closed,
    it would exclude the properties of the other one. Keywords that are null are left out.
    """
    nodes: dict[Path, Schema] = {}

    def copied(node: Schema, path: Path) -> Schema:
        given = {keyword: value for keyword, value in node.items() if value is not None or keyword in _VALUES}
        nodes[path] = given
        return given

    made: Schema = rewritten(schema, copied)
    merged = _merged(nodes)
    for path, node in nodes.items():
        if path not in merged and _may_close(node):
            node["additionalProperties"] = False
    return made


def _may_close(node: Schema) -> bool:
    properties, required = node.get("properties"), node.get("required", ())
    if not isinstance(properties, dict) or node.keys() & {"additionalProperties", "unevaluatedProperties"}:
        return False
    return isinstance(required, (list, tuple)) and all(name in properties for name in required)


def _merged(nodes: Mapping[Path, Schema]) -> set[Path]:
    """The paths of the nodes that apply to a value together with another one."""
    due = [path for path, node in nodes.items() if _merges(node)]
    found: set[Path] = set()
    while due:
        path = due.pop()
        if path in nodes and path not in found:
            found.add(path)
            due += _members(nodes[path], path)
    return found


def _merges(node: Schema) -> bool:
    combining = [keyword for keyword in _COMBINING if keyword in node]
    return "allOf" in combining or (bool(combining) and len(node.keys() - ANNOTATIONS - {"type"}) > 1)


def _members(node: Schema, path: Path) -> list[Path]:
    listed = [(*path, keyword, str(place)) for keyword in _COMBINING for place in range(len(_listed(node, keyword)))]
    reference = node.get("$ref")
    return [*listed, _steps(reference)] if isinstance(reference, str) else listed


def _steps(reference: str) -> Path:
    """The path of a JSON pointer into the schema itself."""
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in reference.removeprefix("#").split("/")[1:])


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
        for key in _steps(reference):
            found = found.get(key) if isinstance(found, dict) else None
        return found


def _listed(node: dict[str, Any], keyword: str) -> list[Any]:
    value = node.get(keyword)
    return value if isinstance(value, list) else []
