"""How a base writes a tool call: the texts around name and arguments, inferred from its chat template.

The template renders an example call once; there is no list of model names. The plain format below is used, and the
tools are described in a system message, if the template does not support tools or writes calls that are not JSON or
that begin with a control token, which is never text. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NAME, _KEY, _TEXT, _RESULT = "lookup_probe", "probe_key", "plain probe text", "result probe text"
_ARGUMENTS = re.compile(r'\{\s*"probe_key"\s*:\s*7\s*\}')

Render = Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None], str]
"""(messages, tools) → the prompt's text, without the beginning of a new turn. Raises what a template raises."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A call is `opening` name `middle` arguments `closing`. Calls are separated by `separator`."""

    opening: str
    middle: str
    closing: str
    separator: str | None
    """None: the template allows one call per turn."""
    native: bool
    """True for the template's own format; otherwise `plain_messages` puts tools and calls into messages."""

    @property
    def trigger(self) -> str:
        """The text that marks the beginning of a call."""
        marker = self.opening.partition("{")[0].rstrip()
        return marker or self.opening


PLAIN = ToolFormat(
    opening='<tool_call>{"name": "',
    middle='", "arguments": ',
    closing="}</tool_call>",
    separator="\n",
    native=False,
)


def infer_format(render: Render, control_tokens: Sequence[str]) -> ToolFormat:
    """The template's own format if calls in it can be read back from text, else PLAIN."""
    found = _inferred(render)
    if found is None or any(token in text for token in control_tokens for text in (found.opening, found.closing)):
        return PLAIN
    return found


def _inferred(render: Render) -> ToolFormat | None:
    tool = {
        "type": "function",
        "function": {
            "name": _NAME,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {_KEY: {"type": "integer"}}, "required": [_KEY]},
        },
    }
    user = {"role": "user", "content": "Look it up."}
    call = {"type": "function", "id": "call12345", "function": {"name": _NAME, "arguments": {_KEY: 7}}}
    try:
        with_text = render([user, {"role": "assistant", "content": _TEXT}], [tool])
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        with_call = render([user, calling], [tool])
        result = {"role": "tool", "tool_call_id": "call12345", "name": _NAME, "content": _RESULT}
        answered = render([user, calling, result], [tool])
    except Exception:  # a template may raise anything: then it does not support tools
        return None
    header, found, trailer = with_text.rpartition(_TEXT)
    if not found or _NAME not in header or _RESULT not in answered:
        return None
    if not with_call.startswith(header) or not with_call.endswith(trailer):
        return None
    body = with_call[len(header) : len(with_call) - len(trailer)]
    split = _split(body)
    if split is None:
        return None
    opening, middle, closing = split
    if not opening.endswith('"') or not middle.startswith('"') or "{" not in opening:
        return None
    return ToolFormat(
        opening, middle, closing, _separator(render, user, tool, call, body, (header, trailer)), native=True
    )


def _split(body: str) -> tuple[str, str, str] | None:
    arguments = _ARGUMENTS.search(body)
    at = body.find(_NAME)
    if arguments is None or not 0 <= at < arguments.start():
        return None
    return body[:at], body[at + len(_NAME) : arguments.start()], body[arguments.end() :]


def _separator(render: Render, user: Any, tool: Any, call: Any, body: str, around: tuple[str, str]) -> str | None:
    """The text between two calls of one turn."""
    try:
        two = render([user, {"role": "assistant", "content": "", "tool_calls": [call, call]}], [tool])
    except Exception:  # the template allows one call per turn
        return None
    both = two[len(around[0]) : len(two) - len(around[1])]
    if not both.startswith(body) or not both.endswith(body) or len(both) < 2 * len(body):
        return None
    return both[len(body) : len(both) - len(body)]


def plain_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template without tools: a system message describes them, calls and results become text."""
    plain = [_plain_message(message) for message in messages]
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = PLAIN.opening + "NAME" + PLAIN.middle + "{...}" + PLAIN.closing
    text = (
        "You can call these functions, one JSON description a line:\n"
        f"{lines}\nTo call one, answer with its name and arguments as JSON, like this:\n{example}"
    )
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        PLAIN.opening
        + call["function"]["name"]
        + PLAIN.middle
        + json.dumps(call["function"]["arguments"], ensure_ascii=False)
        + PLAIN.closing
        for call in message.get("tool_calls", ())
    ]
    parts = [message["content"], *calls] if message["content"] or not calls else calls
    return {"role": message["role"], "content": "\n".join(parts)}
