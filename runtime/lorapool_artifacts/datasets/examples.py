"""The values that lines become: an example of a conversation, or of a prompt with its completion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ChatExample:
    messages: tuple[Mapping[str, Any], ...]
    """As the line has them."""
    tools: tuple[Mapping[str, Any], ...]
    counted: tuple[int, ...]
    """Positions of the messages whose tokens count in the loss, ascending; never empty."""


@dataclass(frozen=True, slots=True)
class CompletionExample:
    prompt: str
    completion: str
    """What counts in the loss, up to and including the token that ends an answer."""


Example = ChatExample | CompletionExample
