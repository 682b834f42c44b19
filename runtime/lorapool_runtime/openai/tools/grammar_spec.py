"""The grammar that an answer must follow, as text: made when a request is parsed, compiled by `grammar`. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models usually see it, without optional white space, which a model could generate endlessly."""


@dataclass(frozen=True, slots=True)
class SchemaPart:
    """A JSON schema of a request."""

    param: str
    """The request parameter that it comes from, for error messages."""
    schema: str
    """As JSON text."""
    strict: bool
    """True: it is enforced in full or refused. Otherwise a keyword that cannot be enforced is left out."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One JSON schema, or a grammar in the library's Lark dialect around several."""

    param: str
    """The request parameter that it comes from, for error messages."""
    parts: tuple[SchemaPart, ...]
    lark: tuple[str, ...] = ()
    """The texts around the schemas, one more than these. Empty: the one schema is the grammar."""

    def text(self, schemas: Sequence[str]) -> str:
        """The library's Lark grammar with these schemas in place of `parts`; for one schema, the schema itself."""
        if not self.lark:
            return schemas[0]
        styled = [f"%json {_styled(schema)}" for schema in schemas]
        return "".join(f"{before}{schema}" for before, schema in zip(self.lark, [*styled, ""], strict=True))


def _styled(schema: str) -> str:
    return json.dumps({**json.loads(schema), "x-guidance": JSON_STYLE}, ensure_ascii=False)
