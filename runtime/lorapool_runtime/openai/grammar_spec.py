"""The grammar that an answer must follow, as text: made when a request is parsed, compiled by `grammar`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models usually see it, without optional white space, which a model could generate endlessly."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A JSON schema, or a grammar in the library's Lark dialect."""

    param: str
    """The request parameter that it comes from, for error messages."""
    schema: str | None = None
    lark: str | None = None
    parts: tuple[tuple[str, str], ...] = ()
    """(param, schema) of each schema within `lark`, so that an error message can name it."""
