"""A JSON body whose fields are read by type and bound; an unknown field that asks for something is refused by name.

It knows the parameters that are accepted without effect, but not what any parameter means.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from lorapool_api.openai import InvalidRequestError

MAX_JSON_DEPTH = 32
MAX_CONTAINERS = 100_000
"""Lists and objects of one body. Each costs the event loop some 0.3 µs; 4 MiB could hold 1.4 million of them."""
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)

_LABELS = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store"}
)
"""Labels and wishes for the caller's own use, accepted without effect, like `user`. Nothing is stored."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # unsupported parameters, and the values with which they have no effect and are accepted
    "functions": (None, []),
    "function_call": (None, "none"),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "add_generation_prompt": (None, True),
    "add_special_tokens": (None,),
    "continue_final_message": (None, False),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "length_penalty": (None, 1),
    "prompt_embeds": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "stop_token_ids": (None, []),
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values of parameters that are not known at all, with which they ask for nothing."""


class Body:
    """A JSON object whose fields are read by type and bound. Null means that a field is not given, as with OpenAI."""

    def __init__(self, raw: bytes | dict[str, Any], known: frozenset[str]) -> None:
        """`raw`: the JSON text, or its object."""
        self.fields = raw if isinstance(raw, dict) else parse_json_object(raw, constants=True)
        for name in self.fields:
            self._check_known(name, known)

    def _check_known(self, name: str, known: frozenset[str]) -> None:
        if name in known or name in _LABELS:
            return
        if name in _NEUTRAL:
            if _is_one_of(self.fields[name], _NEUTRAL[name]):
                return
            raise InvalidRequestError(
                f"`{name}` is not supported by this server.", param=name, code="unsupported_parameter"
            )
        if _is_one_of(self.fields[name], _NOTHING):
            return
        shown = printable(name)
        raise InvalidRequestError(f"Unknown parameter: `{shown}`.", param=shown, code="unknown_parameter")

    def refuse(self, name: str, why: str) -> NoReturn:
        raise InvalidRequestError(f"`{name}` {why}.", param=name)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            self.refuse(name, "must be a non-empty string")
        return clean_text(value, name)

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.refuse(name, "must be true or false")
        return value

    def integer(self, name: str, default: Any, *, low: int, high: int | None = None) -> Any:
        """The field, or `default`, which is not checked, when it is not given."""
        value = self.fields.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            bound = f"at least {low}" if high is None else f"between {low} and {high}"
            self.refuse(name, f"must be a whole number, {bound}")
        return value

    def number(self, name: str, default: float, *, low: float, high: float, above: bool = False) -> float:
        value = self.fields.get(name)
        if value is None:
            return default
        usable = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not usable or not math.isfinite(value) or value < low or value > high or (above and value == low):
            start = f"above {low:g}" if above else f"between {low:g}"
            self.refuse(name, f"must be a number {start} and {'at most ' if above else ''}{high:g}")
        return float(value)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether it is one of these JSON values, in which false is not the number 0."""
    return any(value == one and isinstance(value, bool) is isinstance(one, bool) for one in values)


def parse_json_object(raw: bytes, *, constants: bool = False) -> dict[str, Any]:
    """The body as an object of bounded depth and number of values. Raises InvalidRequestError.

    `constants` lets NaN and Infinity through, which are not JSON, so that the caller can name their parameter.
    """
    if _containers(raw) > MAX_CONTAINERS and _containers(_STRING.sub(b"", raw)) > MAX_CONTAINERS:
        raise InvalidRequestError(f"The body holds more than {MAX_CONTAINERS} lists and objects.", code="invalid_json")
    try:
        value = json.loads(raw, parse_constant=None if constants else _no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("The body must be a JSON object.", code="invalid_json")
    _check_depth(value)
    for name, own in value.items():
        if isinstance(own, (dict, list)) and not _all_finite(own):
            shown = printable(name)
            raise InvalidRequestError(f"`{shown}` holds a number that is not finite.", param=shown)
    return value


def _containers(raw: bytes) -> int:
    return raw.count(b"[") + raw.count(b"{")


def _all_finite(value: Any) -> bool:
    """True when no number in it is NaN or infinite. The depth must be bounded."""
    if isinstance(value, float):
        return math.isfinite(value)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_all_finite(one) for one in inner if isinstance(one, (float, dict, list)))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _check_depth(value: Any) -> None:
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise InvalidRequestError(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.", code="invalid_json")


def clean_text(value: str, name: str) -> str:
    """Returns `value`. Refuses an unpaired surrogate, which JSON can express but UTF-8 cannot encode."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"`{name}` holds an unpaired surrogate, which is not valid text.", param=name
        ) from error
    return value


def printable(name: str) -> str:
    """A client's name, shortened and in ASCII, for an error message."""
    return name[:64].encode("ascii", "replace").decode()
