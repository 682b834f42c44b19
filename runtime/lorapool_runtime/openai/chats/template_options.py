"""How a request wants its conversation written: variables for the chat template, and where the answer begins."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorapool_runtime.openai.json_body import Body, clean_text

MAX_KWARGS = 32
MAX_KWARGS_CHARS = 16_384
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
RESERVED = frozenset(
    {
        "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
        "bos_token", "eos_token", "raise_exception", "strftime_now", "namespace", "dict", "range",
    }
)  # fmt: skip
"""Names that a template is given by the server: no variable of a request replaces them."""


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template besides those that every template has."""
    add_generation_prompt: bool = True
    """The prompt ends with the beginning of the assistant's turn."""
    continue_final: bool = False
    """The prompt ends within the last message, which the answer continues."""


def parse_template_options(body: Body) -> TemplateOptions:
    """Raises InvalidRequestError naming the parameter at fault."""
    continues = body.flag("continue_final_message")
    begins = body.fields.get("add_generation_prompt") is not None and body.flag("add_generation_prompt")
    if continues and begins:
        body.refuse("continue_final_message", "cannot be combined with `add_generation_prompt`: set that to false")
    wanted = not continues and (begins or body.fields.get("add_generation_prompt") is None)
    return TemplateOptions({**_effort(body), **_kwargs(body)}, wanted, continues)


def _effort(body: Body) -> Mapping[str, Any]:
    """`reasoning_effort` by its own name, and as the switch that templates with optional reasoning have."""
    value = body.fields.get("reasoning_effort")
    if value is None:
        return {}
    if value not in REASONING_EFFORTS:
        body.refuse("reasoning_effort", f"must be one of {', '.join(REASONING_EFFORTS)}")
    return {"reasoning_effort": value, "enable_thinking": value != "none"}


def _kwargs(body: Body) -> Mapping[str, Any]:
    name = "chat_template_kwargs"
    value = body.fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_KWARGS:
        body.refuse(name, f"must be an object of at most {MAX_KWARGS} variables of the chat template")
    for key in value:
        if not key.isidentifier() or key in RESERVED:
            body.refuse(name, "must hold names of variables that the server does not set itself")
    if len(clean_text(json.dumps(value, ensure_ascii=False), name)) > MAX_KWARGS_CHARS:
        body.refuse(name, f"must not be longer than {MAX_KWARGS_CHARS} characters")
    return value
