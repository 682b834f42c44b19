"""One line of a chat data set: the messages, their weights and the tools, checked field by field.

The format is OpenAI's for supervised fine-tuning. What it does not define is refused by name, because a misspelt field
would otherwise train something else than was meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lorapool_api.tuning.finetunejob import LossOn
from lorapool_artifacts.datasets.errors import DatasetError, shown
from lorapool_artifacts.datasets.examples import ChatExample

ROLES = ("system", "developer", "user", "assistant", "tool")
_LINE_KEYS = frozenset({"messages", "tools", "parallel_tool_calls"})
_MESSAGE_KEYS = frozenset({"role", "content", "name"})
_KEYS_OF_ROLE: Mapping[str, frozenset[str]] = {
    "assistant": frozenset({"weight", "tool_calls", "reasoning_content"}),
    "tool": frozenset({"tool_call_id"}),
}
_EMPTY_IN_ANSWERS = frozenset({"refusal", "audio", "annotations", "function_call", "tool_calls", "reasoning_content"})
"""Fields that answers of a server have, and that may stay in copied messages while they are null or empty."""


def chat_example(line: Mapping[str, Any], number: int, loss_on: LossOn) -> ChatExample:
    """Raises DatasetError naming example and message."""
    if unknown := sorted(line.keys() - _LINE_KEYS):
        _refuse(number, None, f"the key {shown(unknown[0])} is unknown; there are {', '.join(sorted(_LINE_KEYS))}")
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages:
        _refuse(number, None, "`messages` must be a non-empty list")
    for place, message in enumerate(messages, 1):
        _check_message(message, number, place)
    parallel = line.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        _refuse(number, None, "`parallel_tool_calls` must be true or false")
    return ChatExample(tuple(messages), _tools(line.get("tools"), number), _counted(messages, number, loss_on))


def _check_message(message: Any, number: int, place: int) -> None:
    if not isinstance(message, dict):
        _refuse(number, place, "it must be an object with `role` and `content`")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        what = "has no `role`" if role is None else f"has the unknown role {shown(role)}"
        _refuse(number, place, f"it {what}; roles are {', '.join(ROLES)}")
    _check_keys(message, role, number, place)
    _check_content(message, number, place)
    if message.get("tool_calls"):
        _check_calls(message["tool_calls"], number, place)
    for name in ("name", "tool_call_id", "reasoning_content"):
        if not isinstance(message.get(name, ""), str | None):
            _refuse(number, place, f"`{name}` must be a string")


def _check_keys(message: Mapping[str, Any], role: str, number: int, place: int) -> None:
    allowed = _MESSAGE_KEYS | _KEYS_OF_ROLE.get(role, frozenset())
    for key in message.keys() - allowed:
        if key in _EMPTY_IN_ANSWERS and not message[key]:
            continue
        known = any(key in keys for keys in _KEYS_OF_ROLE.values())
        what = f"`{key}` is not a key of a message of role {role}" if known else f"the key {shown(key)} is unknown"
        _refuse(number, place, what)
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, int) or weight not in (0, 1):
        _refuse(number, place, f"`weight` is {shown(weight)}; it must be 0 or 1")


def _check_content(message: Mapping[str, Any], number: int, place: int) -> None:
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            _refuse(number, place, "`content` is missing or null; only a message with `tool_calls` may have none")
    elif isinstance(content, list):
        if not content or not all(_is_text_part(part) for part in content):
            _refuse(number, place, '`content` must be a string, or a list of parts of type "text"')
    elif not isinstance(content, str):
        _refuse(number, place, f"`content` is {shown(content)}; it must be a string")


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _check_calls(calls: Any, number: int, place: int) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            _refuse(number, place, "each of `tool_calls` must hold a `function` with `name` and `arguments`")
        if not isinstance(function.get("arguments"), str):
            _refuse(number, place, "`arguments` of a tool call must be a string of JSON")


def _tools(tools: Any, number: int) -> tuple[Mapping[str, Any], ...]:
    if tools is None:
        return ()
    for tool in tools if isinstance(tools, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not _is_name(function.get("name")):
            _refuse(number, None, '`tools` must be a list of {"type": "function", "function": {"name": …}}')
    return tuple(tools)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _counted(messages: Sequence[Mapping[str, Any]], number: int, loss_on: LossOn) -> tuple[int, ...]:
    """Positions of the assistant's messages whose tokens count in the loss."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        _refuse(number, None, "it has no message of the assistant, so there is nothing to learn")
    chosen = answers if loss_on is LossOn.ASSISTANT else answers[-1:]
    counted = tuple(place for place in chosen if messages[place].get("weight", 1) == 1)
    if not counted:
        which = "all messages" if loss_on is LossOn.ASSISTANT else "the last message"
        _refuse(number, None, f"{which} of the assistant have weight 0, so there is nothing to learn")
    return counted


def _refuse(number: int, place: int | None, why: str) -> NoReturn:
    where = f"Example {number}" if place is None else f"Example {number}, message {place}"
    raise DatasetError(f"{where}: {why}.", line=number)
