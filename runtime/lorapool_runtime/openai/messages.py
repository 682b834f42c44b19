"""The `messages` of a chat request, with whatever other clients and servers have put into earlier ones.

A history is not only what this server wrote: other servers, SDKs and user interfaces add fields of their own, leave
contents out, and keep tool calls that were cut off. None of that changes what was said, so it is accepted; a field that
holds content which cannot be read is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.json_body import Body, clean_text

MAX_MESSAGES = 2048
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names under which servers return the reasoning of an answer; templates read the first."""
UNPARSED = "raw_arguments"
"""The key of call arguments that are not a JSON object: templates only write objects."""

Message = Mapping[str, Any]

_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
"""The names that templates know, for OpenAI's newer and older ones."""
_HOLD_CONTENT = ("audio", "images", "videos", "files", "attachments")
"""Fields of messages that hold what a text model cannot read."""
_PREFILL = ("prefix", "partial")
"""Other servers' names for `continue_final_message`, as fields of the last message."""
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the field that has it."""
_SILENT_PARTS = ("thinking", "reasoning", "redacted_thinking")
"""Types of parts that hold reasoning in the format of another server, which no template takes."""


def parse_messages(body: Body) -> tuple[Message, ...]:
    """The messages as chat templates take them. Raises InvalidRequestError naming the field at fault."""
    value = body.fields.get("messages")
    if not isinstance(value, list) or not value:
        body.refuse("messages", "must be a non-empty list")
    if len(value) > MAX_MESSAGES:
        body.refuse("messages", f"may hold at most {MAX_MESSAGES} messages")
    return tuple(_message(item, f"messages[{place}]") for place, item in enumerate(value))


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        _refuse(where, "must be an object")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(
            f"`{where}.role` must be one of {', '.join(ROLES)}.", param=f"{where}.role", code="unsupported_role"
        )
    _check_fields(item, where)
    if role == "assistant":
        return _assistant_message(item, where)
    if role in ("tool", "function"):
        return _tool_message(item, where)
    return {"role": _TEMPLATE_ROLES.get(role, role), "content": _content(item.get("content"), where)}


def _check_fields(item: Mapping[str, Any], where: str) -> None:
    for name in _HOLD_CONTENT:
        if item.get(name):
            _refuse_content(f"{where}.{name}", "holds what this model cannot read: it accepts text")
    for name in _PREFILL:
        if item.get(name):
            _refuse(f"{where}.{name}", "is not supported: set `continue_final_message` in the request")


def _assistant_message(item: Mapping[str, Any], where: str) -> Message:
    said: dict[str, Any] = {"role": "assistant", "content": _said(item, where)}
    reasoning = next((item[name] for name in REASONING_FIELDS if isinstance(item.get(name), str) and item[name]), None)
    if reasoning is not None:
        said["reasoning_content"] = clean_text(reasoning, f"{where}.reasoning_content")
    if calls := _calls(item, where):
        said["tool_calls"] = calls
    return said


def _said(item: Mapping[str, Any], where: str) -> str:
    """The text of an assistant message: empty for null, and the refusal where that is all it says."""
    content, refusal = item.get("content"), item.get("refusal")
    if not content and isinstance(refusal, str):
        return clean_text(refusal, f"{where}.refusal")
    return "" if content is None else _content(content, where)


def _tool_message(item: Mapping[str, Any], where: str) -> Message:
    content, answered = item.get("content"), item.get("tool_call_id")
    answer: dict[str, Any] = {"role": "tool", "content": "" if content is None else _content(content, where)}
    if isinstance(answered, str) and answered:
        answer["tool_call_id"] = clean_text(answered, f"{where}.tool_call_id")
    elif answered is not None and not isinstance(answered, str):
        _refuse(f"{where}.tool_call_id", "must be the id of the call that this message answers")
    if isinstance(item.get("name"), str) and item["name"]:
        answer["name"] = clean_text(item["name"], f"{where}.name")
    return answer


# --- contents -----------------------------------------------------------------------------


def _content(value: Any, where: str) -> str:
    param = f"{where}.content"
    if isinstance(value, str):
        return clean_text(value, param)
    if not isinstance(value, list):
        _refuse(param, "must be a string or a list of text parts")
    return "".join(_part(part, f"{param}[{place}]") for place, part in enumerate(value))


def _part(part: Any, param: str) -> str:
    if isinstance(part, str):
        return clean_text(part, param)
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _SILENT_PARTS:
        return ""
    text = part.get(_TEXT_PARTS[kind]) if isinstance(kind, str) and kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        _refuse_content(param, 'must be a part of type "text"; this model accepts no other type')
    return clean_text(text, param)


# --- earlier calls ------------------------------------------------------------------------


def _calls(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The calls of an assistant message; OpenAI's older `function_call` counts as one."""
    older = item.get("function_call")
    value = item.get("tool_calls") or ([{"function": older}] if older else [])
    where = f"{where}.tool_calls" if item.get("tool_calls") else f"{where}.function_call"
    if not isinstance(value, list):
        _refuse(where, "must be a list of calls")
    return [_call(call, place, f"{where}[{place}]") for place, call in enumerate(value)]


def _call(call: Any, place: int, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        _refuse(where, "must hold a `function` with name and arguments")
    name, call_id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        _refuse(f"{where}.function.name", "must be the name of the function that was called")
    own_id = call_id if isinstance(call_id, str) and call_id else f"call_{place}"
    return {
        "id": clean_text(own_id, f"{where}.id"),
        "type": "function",
        "function": {
            "name": clean_text(name, f"{where}.function.name"),
            "arguments": _arguments(function.get("arguments"), f"{where}.function.arguments"),
        },
    }


def _arguments(value: Any, param: str) -> Mapping[str, Any]:
    """An object, as templates take it: given as one, or as its text. Anything else is kept as text under a key."""
    if value is None or value == "":
        return {}
    if isinstance(value, dict):
        if not _is_clean(value):
            _refuse(param, "holds an unpaired surrogate, which is not valid text")
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    clean_text(text, param)
    try:
        parsed = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) and _is_clean(parsed) else {UNPARSED: text}


def _is_clean(value: Mapping[str, Any]) -> bool:
    """False for an object whose escapes hold an unpaired surrogate, or that is nested too deeply to be written."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _refuse(param: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"`{param}` {why}.", param=param)


def _refuse_content(param: str, why: str) -> NoReturn:
    raise InvalidRequestError(f"`{param}` {why}.", param=param, code="unsupported_content")
