"""What a chat template accepts, found by rendering short conversations, and conversations changed to fit it.

Some templates know no system role, or want user and assistant to alternate. Texts of the system are then merged into
the next user turn and neighbouring turns of one role are joined. A change is made only if the template renders all of
the changed conversation and not all of the original. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorapool_runtime.openai.tools.tool_format import PLAIN, Render, ToolFormat, infer_format

Message = Mapping[str, Any]

_SEPARATOR = "\n\n"
_FIRST, _SECOND, _THIRD = "first probe text", "second probe text", "third probe text"


@dataclass(frozen=True, slots=True)
class TemplateShape:
    tools: ToolFormat = PLAIN
    system: bool = True
    """A conversation may begin with a system message."""
    late_system: bool = True
    """System messages may follow others."""
    repeats: bool = True
    """Several turns of one role may follow each other."""


AS_GIVEN = TemplateShape()


def infer_shape(render: Render, control_tokens: Sequence[str]) -> TemplateShape:
    """The shape of a template that can be rendered; what it does with tools is found by `tool_format`."""
    shape = replace(AS_GIVEN, tools=infer_format(render, control_tokens))
    system, user, assistant = _message("system", _FIRST), _message("user", _SECOND), _message("assistant", _THIRD)
    other = _message("user", _FIRST)
    shape = _better(render, shape, replace(shape, system=False), [system, user])
    shape = _better(render, shape, replace(shape, repeats=False), [other, user, assistant, user])
    return _better(render, shape, replace(shape, late_system=False), [user, assistant, system, user])


def _better(render: Render, shape: TemplateShape, changed: TemplateShape, messages: list[Message]) -> TemplateShape:
    """`changed` if the template needs that to write all of the messages, else `shape`."""
    if not _writes_all(render, fit(messages, shape)) and _writes_all(render, fit(messages, changed)):
        return changed
    return shape


def _writes_all(render: Render, messages: Sequence[Message]) -> bool:
    try:
        text = render(messages, None)
    except Exception:  # a template may raise anything
        return False
    return all(part in text for message in messages for part in message["content"].split(_SEPARATOR))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def fit(messages: Sequence[Message], shape: TemplateShape) -> list[Message]:
    """The conversation as the template accepts it."""
    fitted = list(messages)
    if not shape.system or not shape.late_system:
        fitted = _without_system(fitted, keep_first=shape.system)
    return fitted if shape.repeats else _joined(fitted)


def _without_system(messages: Sequence[Message], *, keep_first: bool) -> list[Message]:
    """System texts before the user turn that follows them; those at the beginning in one message if `keep_first`."""
    begin = next((place for place, message in enumerate(messages) if message["role"] != "system"), len(messages))
    first = [message["content"] for message in messages[:begin]]
    kept = [_message("system", _SEPARATOR.join(first))] if first and keep_first else []
    waiting = [] if keep_first else first
    for message in messages[begin:]:
        if message["role"] == "system":
            waiting = [*waiting, message["content"]]
        elif message["role"] == "user" and waiting:
            kept.append({**message, "content": _SEPARATOR.join([*waiting, message["content"]])})
            waiting = []
        else:
            kept.append(message)
    return [*kept, _message("user", _SEPARATOR.join(waiting))] if waiting else kept


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Neighbouring turns of one role as one."""
    kept: list[Message] = []
    for message in messages:
        if kept and _can_join(kept[-1], message):
            kept[-1] = {**kept[-1], "content": _SEPARATOR.join((kept[-1]["content"], message["content"]))}
        else:
            kept.append(message)
    return kept


def _can_join(before: Message, after: Message) -> bool:
    same = before["role"] == after["role"] and before["role"] in ("user", "assistant")
    return same and not before.get("tool_calls") and not after.get("tool_calls")
