"""A body of `/v1/responses`, translated into a chat request. Pure.

Nothing is stored: every request brings its whole conversation, `store` has no effect, and what refers to a stored
answer is refused. Errors name the parameters of this API, whichever chat parameter they became.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.json_body import parse_json_object, printable
from lorapool_runtime.openai.request import ChatRequest, parse_chat

_RENAMED = {
    # parameter of this API: chat parameter
    "max_output_tokens": "max_completion_tokens",
}
_OWN = frozenset(
    {
        "background", "conversation", "include", "input", "instructions", "max_output_tokens", "max_tool_calls",
        "previous_response_id", "prompt", "reasoning", "text", "tool_choice", "tools", "top_logprobs", "truncation",
    }
)  # fmt: skip
_CHAT_ONLY = frozenset(
    {
        "add_generation_prompt", "continue_final_message", "logprobs", "max_completion_tokens", "max_tokens",
        "messages", "n", "reasoning_effort", "response_format", "verbosity",
    }
)  # fmt: skip
_STATELESS = "is not supported: this server stores no answers, so send the whole conversation in `input`"
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    # values that are accepted, and why no others are
    "background": ((None, False), "is not supported by this server"),
    "conversation": ((None,), _STATELESS),
    "previous_response_id": ((None,), _STATELESS),
    "prompt": ((None,), "is not supported: this server stores no prompts"),
    "truncation": ((None, "disabled"), "is not supported with this value: shorten `input`"),
}
_LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (_LOGPROBS, "reasoning.encrypted_content")
"""Values of `include`. There is no encrypted reasoning, so that one changes nothing."""
_TEXT_PARTS = ("input_text", "output_text", "text")


@dataclass(frozen=True, slots=True)
class ResponsesRequest(ChatRequest):
    given: Mapping[str, Any] = field(default_factory=dict)
    """The fields of the body, which the answer repeats."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Chat parameter, or the beginning of its path → its name in this API."""

    @property
    def prompt_param(self) -> str:
        return "input"

    def own_param(self, param: str) -> str:
        return _own_param(param, self.names)


def parse_responses(raw: bytes) -> ResponsesRequest:
    """Parses a body. Raises InvalidRequestError naming the parameter at fault."""
    given = parse_json_object(raw, constants=True)
    _refuse_unsupported(given)
    names: dict[str, str] = {"response_format.json_schema": "text.format", "response_format": "text.format"}
    names |= {chat: own for own, chat in _RENAMED.items()}
    names |= {"reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity", "messages": "input"}
    chat: dict[str, Any] = {name: value for name, value in given.items() if name not in _OWN}
    chat |= {_RENAMED[name]: given[name] for name in _RENAMED if name in given}
    chat |= _text(given.get("text")) | _reasoning(given.get("reasoning")) | _logprobs(given)
    chat["messages"] = _messages(given, names)
    if given.get("tools") is not None:
        chat["tools"] = _tools(given["tools"], names)
    if given.get("tool_choice") is not None:
        chat["tool_choice"] = _tool_choice(given["tool_choice"])
    try:
        parsed = parse_chat(chat)
    except InvalidRequestError as error:
        raise renamed(error, names) from None
    own = {item.name: getattr(parsed, item.name) for item in fields(parsed)}
    return ResponsesRequest(**own, given=given, names=names)


def renamed(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    """The error with the names of this API in place of the chat parameters."""
    if error.param is None:
        return error
    param = _own_param(error.param, names)
    message = error.message.replace(f"`{error.param}", f"`{param}")
    return InvalidRequestError(message, param=param, code=error.code, retry_after_s=error.retry_after_s)


def _own_param(param: str, names: Mapping[str, str]) -> str:
    """Replaces the longest beginning that has a name."""
    known = [name for name in names if param == name or param.startswith((f"{name}.", f"{name}["))]
    longest = max(known, key=len, default=None)
    return param if longest is None else names[longest] + param[len(longest) :]


def _refuse_unsupported(given: Mapping[str, Any]) -> None:
    for name, (values, why) in _NEUTRAL.items():
        if not any(given.get(name) is value or given.get(name) == value for value in values):
            raise _error(name, why, "unsupported_parameter")
    for name in given.keys() & _CHAT_ONLY:
        if given[name] is not None:
            raise _error(name, "is not a parameter of /v1/responses", "unknown_parameter")
    for name, least in (("max_tool_calls", 1),):
        value = given.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise _error(name, f"must be a whole number, at least {least}")


def _error(param: str, why: str, code: str | None = None) -> InvalidRequestError:
    return InvalidRequestError(f"`{param}` {why}.", param=param, code=code)


def _object(value: Any, param: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    """The fields that are given of an object; empty for null."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _error(param, "must be an object")
    for name, inner in value.items():
        if name not in known and inner is not None:
            shown = f"{param}.{printable(name)}"
            raise InvalidRequestError(f"Unknown parameter: `{shown}`.", param=shown, code="unknown_parameter")
    return {name: inner for name, inner in value.items() if inner is not None}


# --- parameters ---------------------------------------------------------------------------


def _text(value: Any) -> dict[str, Any]:
    own = _object(value, "text", ("format", "verbosity"))
    chat = {"verbosity": own["verbosity"]} if "verbosity" in own else {}
    if "format" not in own:
        return chat
    kind = own["format"].get("type") if isinstance(own["format"], dict) else None
    if kind != "json_schema":
        return {**chat, "response_format": own["format"]}
    schema = {name: inner for name, inner in own["format"].items() if name != "type" and inner is not None}
    return {**chat, "response_format": {"type": kind, "json_schema": schema}}


def _reasoning(value: Any) -> dict[str, Any]:
    """The effort. There is no summary of the reasoning: the answer has all of it."""
    own = _object(value, "reasoning", ("effort", "summary", "generate_summary"))
    return {"reasoning_effort": own["effort"]} if "effort" in own else {}


def _logprobs(given: Mapping[str, Any]) -> dict[str, Any]:
    included = given.get("include")
    if not isinstance(included, list | None):
        raise _error("include", "must be a list")
    for item in included or ():
        if item not in _INCLUDED:
            raise _error("include", f"may hold only {' and '.join(_INCLUDED)}", "unsupported_parameter")
    top = given.get("top_logprobs")
    if top is None and _LOGPROBS not in (included or ()):
        return {}
    return {"logprobs": True, "top_logprobs": top}


def _tools(value: Any, names: dict[str, str]) -> list[Any]:
    if not isinstance(value, list):
        raise _error("tools", "must be a list")
    tools = []
    for place, item in enumerate(value):
        where = f"tools[{place}]"
        if not isinstance(item, dict) or item.get("type") != "function":
            raise _error(where, 'must be {"type": "function", "name": ...}; other tools are not supported')
        names[f"{where}.function"] = where
        function = {name: inner for name, inner in item.items() if name != "type" and inner is not None}
        tools.append({"type": "function", "function": function})
    return tools


def _tool_choice(value: Any) -> Any:
    if isinstance(value, dict) and value.get("type") == "function" and "function" not in value:
        return {"type": "function", "function": {name: inner for name, inner in value.items() if name != "type"}}
    return value


# --- the conversation ---------------------------------------------------------------------


def _messages(given: Mapping[str, Any], names: dict[str, str]) -> list[dict[str, Any]]:
    """The conversation as chat messages; `names` receives which item of `input` each came from."""
    messages: list[dict[str, Any]] = []
    instructions, value = given.get("instructions"), given.get("input")
    if instructions is not None:
        names[f"messages[{len(messages)}].content"] = "instructions"
        messages.append({"role": "system", "content": instructions})
    if isinstance(value, str):
        names[f"messages[{len(messages)}].content"] = "input"
        return [*messages, {"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise _error("input", "must be a string or a non-empty list of items")
    for place, item in enumerate(value):
        _add_item(item, f"input[{place}]", messages, names)
    return messages


def _add_item(item: Any, where: str, messages: list[dict[str, Any]], names: dict[str, str]) -> None:
    if not isinstance(item, dict):
        raise _error(where, "must be an object")
    match item.get("type", "message"):
        case "message" | None:
            names[f"messages[{len(messages)}]"] = where
            messages.append({"role": item.get("role"), "content": _content(item.get("content"))})
        case "function_call":
            _add_call(item, where, messages, names)
        case "function_call_output":
            here = f"messages[{len(messages)}]"
            names |= {here: where, f"{here}.tool_call_id": f"{where}.call_id", f"{here}.content": f"{where}.output"}
            output = _content(item.get("output"))
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        case "reasoning":
            pass  # the reasoning of earlier turns is not shown to a model again
        case "item_reference":
            raise _error(where, "refers to a stored item, but this server stores none: let your client send the items "
                         "in full (`store: false`)", "unsupported_parameter")  # fmt: skip
        case _:
            raise _error(f"{where}.type", "must be message, function_call, function_call_output or reasoning")


def _add_call(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]], names: dict[str, str]) -> None:
    """Adds a call to the assistant's turn that it follows."""
    if not messages or messages[-1]["role"] != "assistant":
        names[f"messages[{len(messages)}]"] = where
        messages.append({"role": "assistant", "content": None})
    calls = messages[-1].setdefault("tool_calls", [])
    here = f"messages[{len(messages) - 1}].tool_calls[{len(calls)}]"
    names |= {here: where, f"{here}.function": where}
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    calls.append({"type": "function", "id": item.get("call_id"), "function": function})


def _content(value: Any) -> Any:
    return [_part(part) for part in value] if isinstance(value, list) else value


def _part(part: Any) -> Any:
    """A part of a message as chat has it. A part that is not text stays as it is, and is refused as such."""
    if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
        return {"type": "text", "text": part.get("text")}
    if isinstance(part, dict) and part.get("type") == "refusal":
        return {"type": "text", "text": part.get("refusal")}
    return part
