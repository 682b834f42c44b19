"""The types, bounds and defaults with which the runtime reads the parameters of a request: its parser is observed."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from lorapool_runtime.openai import json_body, request


class RecordingBody(json_body.Body):
    """Notes with which bounds each parameter is read."""

    def __init__(self, raw: bytes | dict[str, Any], known: frozenset[str]) -> None:
        super().__init__(raw, known)
        self.known = known
        self.bounds: dict[str, str] = {}
        self.schemas: dict[str, dict[str, Any]] = {}
        """The same as JSON schema."""
        self.defaults: dict[str, str] = {}
        SEEN.append(self)

    def integer(self, name: str, default: Any, *, low: int, high: int | None = None) -> Any:
        most = {} if high is None else {"maximum": high}
        self.schemas.setdefault(name, {"type": "integer", "minimum": low, **most})
        self._note(name, f"integer, at least {low}" if high is None else f"integer, {low} to {high}", default)
        return super().integer(name, default, low=low, high=high)

    def number(self, name: str, default: float, *, low: float, high: float, above: bool = False) -> float:
        least = "exclusiveMinimum" if above else "minimum"
        self.schemas.setdefault(name, {"type": "number", least: low, "maximum": high})
        self._note(name, f"number, {'above ' if above else ''}{low:g} to {high:g}", default)
        return super().number(name, default, low=low, high=high, above=above)

    def flag(self, name: str) -> bool:
        self.schemas.setdefault(name, {"type": "boolean"})
        self._note(name, "true or false", "false")
        return super().flag(name)

    def _note(self, name: str, bounds: str, default: object) -> None:
        self.bounds.setdefault(name, bounds)
        self.defaults.setdefault(name, "" if default is None else f"{default}")


SEEN: list[RecordingBody] = []


def parsed_bodies() -> tuple[RecordingBody, RecordingBody]:
    """The parsed bodies of a chat and of a completion."""
    SEEN.clear()
    with patch.object(request, "Body", RecordingBody):
        request.parse_chat(b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}')
        request.parse_completion(b'{"model": "m", "prompt": "x"}')
    return SEEN[0], SEEN[1]
