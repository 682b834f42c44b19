"""Random JSON schemas, each of which has a valid document of few tokens."""

from __future__ import annotations

import random
from typing import Any

_WORDS = ("id", "name", "count", "tags", "kind", "price", "näme", "a b", 'quo"te', "note")


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of an object, as in `response_format`; equal seeds give equal schemas."""
    rng = random.Random(seed)
    return _object(rng, 3) | {"title": f"schema {seed}", "$defs": {"leaf": _integer(rng, 0)}}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_string, _integer, _number, _boolean, _enum, _const, _pattern]
    if depth > 0:
        kinds += [_object, _array, _union, _nullable]
    return rng.choice(kinds)(rng, depth - 1)


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 4))
    made: dict[str, Any] = {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": rng.sample(names, rng.randint(0, len(names))),
        "additionalProperties": False,
    }
    if rng.random() < 0.2:
        made["properties"]["self"] = {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}
    return made


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), _any(rng, depth)]}


def _nullable(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [_any(rng, depth), {"type": "null"}]}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}


def _pattern(rng: random.Random, depth: int) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": rng.choice(("^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no|maybe)$", "^#[0-9a-f]{6}$")),
    }


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 500)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "number", "minimum": 0, "maximum": rng.randint(1, 9)} if rng.random() < 0.5 else {"type": "number"}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "boolean"}


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "green", 7, 2.5, None, True, "blü"], rng.randint(1, 4))}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 3, False])}
