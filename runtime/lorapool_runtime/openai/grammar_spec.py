"""What an answer must look like, as text: between the parsers at the door and the library that compiles it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""As models are used to see JSON, and no room for white space without end."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """What an answer must look like: a JSON schema or a whole grammar in the library's Lark dialect."""

    param: str
    """The request's parameter it comes from, for refusals."""
    schema: str | None = None
    lark: str | None = None
    parts: tuple[tuple[str, str], ...] = ()
    """(param, schema) of the schemas within `lark`, to name the one at fault."""
