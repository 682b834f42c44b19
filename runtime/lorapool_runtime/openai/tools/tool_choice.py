"""`tools`, `tool_choice` and `response_format`: parsed, and turned into the grammar that the answer must follow.

The grammar of tools depends on how the base writes calls, so it is made after parsing, by `tools_grammar`. Pure: a
grammar is only text here; `grammar` compiles it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lorapool_api.openai import InvalidRequestError
from lorapool_runtime.openai.json_body import Body, clean_text, printable
from lorapool_runtime.openai.tools.grammar_spec import GrammarSpec, SchemaPart
from lorapool_runtime.openai.tools.json_schema import checked_schema
from lorapool_runtime.openai.tools.tool_format import ToolFormat

MAX_TOOLS = 64
MAX_CALLS = 16
"""Maximum number of calls in one answer."""
_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")
_ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    definition: Mapping[str, Any]
    """The tool as the chat template receives it."""
    schema: SchemaPart
    """Of its arguments."""


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The tools that this answer may call, and whether it has to call one."""

    tools: tuple[Tool, ...] = ()
    mode: Literal["none", "auto", "required"] = "none"
    parallel: bool = True
    offered: tuple[Tool, ...] = ()
    """The tools described in the prompt: all of them, even if the answer must call one in particular."""

    @property
    def active(self) -> bool:
        return self.mode != "none"


# --- parsing ------------------------------------------------------------------------------


def parse_response_format(body: Body) -> GrammarSpec | None:
    """None when the answer may be any text. Raises InvalidRequestError."""
    value = body.fields.get("response_format")
    if value is None or value == {"type": "text"}:
        return None
    if not isinstance(value, dict):
        body.refuse("response_format", "must be an object")
    if value == {"type": "json_object"}:
        return GrammarSpec("response_format", (SchemaPart("response_format", _ANY_OBJECT, strict=True),))
    if value.get("type") != "json_schema":
        body.refuse("response_format", "must be of type text, json_object or json_schema")
    _only(value, {"type", "json_schema"}, "response_format")
    own, where = value.get("json_schema"), "response_format.json_schema"
    if not isinstance(own, dict):
        body.refuse(where, "must be an object with `name` and `schema`")
    _only(own, {"name", "schema", "strict", "description"}, where)
    _check_name(own.get("name"), f"{where}.name")
    schema = _schema_part(own, "schema", where)
    return GrammarSpec(schema.param, (schema,))


def parse_tools(body: Body) -> ToolChoice:
    """`tools`, `tool_choice` and `parallel_tool_calls`. Raises InvalidRequestError."""
    value = body.fields.get("tools")
    tools: tuple[Tool, ...] = ()
    if value is not None:
        if not isinstance(value, list) or len(value) > MAX_TOOLS:
            body.refuse("tools", f"must be a list of at most {MAX_TOOLS} tools")
        tools = tuple(_tool(item, f"tools[{place}]") for place, item in enumerate(value))
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            body.refuse("tools", f"names `{name}` more than once")
    parallel = body.fields.get("parallel_tool_calls") is None or body.flag("parallel_tool_calls")
    return _tool_choice(body, tools, parallel)


def _tool_choice(body: Body, tools: tuple[Tool, ...], parallel: bool) -> ToolChoice:
    choice = body.fields.get("tool_choice")
    if choice is None:
        choice = "auto" if tools else "none"
    if choice == "none":
        return ToolChoice()
    if not tools:
        body.refuse("tool_choice", "needs `tools`")
    if choice == "auto":
        return ToolChoice(tools, "auto", parallel, tools)
    if choice == "required":
        return ToolChoice(tools, "required", parallel, tools)
    if not isinstance(choice, dict) or choice.get("type") != "function" or not isinstance(choice.get("function"), dict):
        body.refuse(
            "tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        )
    _only(choice, {"type", "function"}, "tool_choice")
    _only(choice["function"], {"name"}, "tool_choice.function")
    wanted = tuple(tool for tool in tools if tool.name == choice["function"].get("name"))
    if not wanted:
        body.refuse("tool_choice", f"names none of the tools: {', '.join(tool.name for tool in tools)}")
    return ToolChoice(wanted, "required", parallel=False, offered=tools)


def _tool(item: Any, where: str) -> Tool:
    if not isinstance(item, dict) or item.get("type") != "function" or not isinstance(item.get("function"), dict):
        raise InvalidRequestError(
            f'`{where}` must be {{"type": "function", "function": {{...}}}}; other tools are not supported.',
            param=where,
        )
    _only(item, {"type", "function"}, where)
    function, where = item["function"], f"{where}.function"
    _only(function, {"name", "description", "parameters", "strict"}, where)
    _check_name(function.get("name"), f"{where}.name")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise InvalidRequestError(f"`{where}.description` must be a string.", param=f"{where}.description")
    own = {**function, "parameters": _parameters(function.get("parameters"), f"{where}.parameters")}
    schema = _schema_part(own, "parameters", where)
    definition = {
        "name": function["name"],
        "description": clean_text(description, f"{where}.description"),
        "parameters": own["parameters"],
    }
    return Tool(function["name"], {"type": "function", "function": definition}, schema)


def _parameters(value: Any, param: str) -> dict[str, Any]:
    """The schema of a tool's arguments, which are an object. A tool that lists none takes none."""
    given = {} if value is None else value
    if not isinstance(given, dict) or given.get("type") not in (None, "object"):
        raise InvalidRequestError(f"`{param}` must be a JSON schema of type object.", param=param)
    named = {keyword: inner for keyword, inner in given.items() if inner is not None}
    listed: dict[str, Any] = {} if named.keys() & {"$ref", "allOf", "anyOf", "oneOf"} else {"properties": {}}
    return {"type": "object", **listed, **named}


def _schema_part(holder: Mapping[str, Any], name: str, where: str) -> SchemaPart:
    """The checked schema in the field `name`, as strict as the field `strict` says."""
    strict, param = holder.get("strict"), f"{where}.{name}"
    if not isinstance(strict, bool | None):
        raise InvalidRequestError(f"`{where}.strict` must be true or false.", param=f"{where}.strict")
    schema = checked_schema(holder.get(name), param)
    return SchemaPart(param, clean_text(schema, param), bool(strict))


def _check_name(value: Any, param: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequestError(f"`{param}` must be 1 to 128 letters, digits, _, -, ., : or /.", param=param)


def _only(value: Mapping[str, Any], known: set[str], where: str) -> None:
    for name in value:
        if name not in known:
            shown = f"{where}.{printable(name)}"
            raise InvalidRequestError(f"Unknown parameter: `{shown}`.", param=shown, code="unknown_parameter")


# --- grammars -----------------------------------------------------------------------------


def tools_grammar(choice: ToolChoice, style: ToolFormat, answer: GrammarSpec | None = None) -> GrammarSpec:
    """`required`: only calls. `auto`: any text, in which everything that begins as a call is a valid call.

    With an `answer`, the grammar of one schema, `auto` is either calls or such an answer.
    """
    several = choice.parallel and style.separator is not None
    more = f" ({_literal(style.separator or '')} call){{0,{MAX_CALLS - 1}}}" if several else ""
    only_calls = ["calls: call" + more, f"call: {_literal(style.opening)} body"]
    answers: tuple[SchemaPart, ...] = ()
    if choice.mode == "required":
        head = ["start: calls", *only_calls]
    elif answer is not None:
        head, answers = ["start: calls | answer", *only_calls], answer.parts
    else:
        head = _free_text(style, several)
    any_body = "body: " + " | ".join(f"body_{place}" for place in range(len(choice.tools)))
    lark = ["\n".join(["%llguidance {}", *head, any_body, ""])]
    for place, tool in enumerate(choice.tools):
        lark[-1] += f"body_{place}: {_literal(tool.name + style.middle)} "
        lark.append(f" {_literal(style.closing)}\n")
    for _ in answers:
        lark[-1] += "answer: "
        lark.append("\n")
    return GrammarSpec("tools", (*(tool.schema for tool in choice.tools), *answers), tuple(lark))


def _free_text(style: ToolFormat, several: bool) -> list[str]:
    return [
        "start: call* text" if several else "start: call | text",
        "text: TEXT",
        f"call: trigger {_literal(style.opening[len(style.trigger) :])} body",
        f"trigger[lazy]: TEXT {_literal(style.trigger)}",
        r"TEXT: /(.|\n)*/",
    ]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
