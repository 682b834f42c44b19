"""How one model is talked to: its chat template, the tokens that end its answers, and tokens that its adapter added.

Values only. `chat_formats` makes them of files and objects, `tokenizer` applies them.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lorapool_api.chat import ChatReport, TemplateOrigin
from lorapool_runtime.openai.chats.template_shape import AS_GIVEN, TemplateShape


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched in texts as a whole."""

    id: int
    text: str
    special: bool = True
    """A control token: it is not part of an answer's text."""
    lstrip: bool = False
    rstrip: bool = False
    """White space before or after it belongs to the token."""


@dataclass(frozen=True)
class ExtraTokens:
    """The tokens that an adapter's tokenizer has in addition to the base's, in rows that the base has anyway."""

    tokens: tuple[AddedToken, ...] = ()

    @functools.cached_property
    def ids(self) -> Mapping[str, int]:
        return {token.text: token.id for token in self.tokens}

    @functools.cached_property
    def by_id(self) -> Mapping[int, AddedToken]:
        return {token.id: token for token in self.tokens}

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.tokens, key=lambda token: len(token.text), reverse=True)
        return re.compile("|".join(f"({_pattern_of(token)})" for token in longest_first))

    def split(self, text: str) -> Iterator[str | int]:
        """The text in parts: the ids of these tokens, and the texts between them."""
        if not self.tokens:
            yield text
            return
        at = 0
        for match in self._pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()]
            yield self.ids[match[0] if match[0] in self.ids else match[0].strip()]
            at = match.end()
        if at < len(text):
            yield text[at:]


def _pattern_of(token: AddedToken) -> str:
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{left}{re.escape(token.text)}{right}"


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """Immutable and shared by all requests of a model."""

    template: str | None
    """None: the model is not made for chat."""
    tool_template: str | None = None
    """The template of conversations with tools, where the model has one of its own for them."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """What every template is given: `bos_token`, `eos_token` and the like."""
    shape: TemplateShape = AS_GIVEN
    control_tokens: frozenset[str] = frozenset()
    """Texts that only the template itself may write as tokens."""
    special_ids: Mapping[str, int] = field(default_factory=dict)
    """The ids of the control tokens that are not part of an answer's text, by their text."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an answer, besides those of the engine."""
    stop_tokens: tuple[str, ...] = ()
    """The texts of all tokens that end an answer, for the report."""
    extra: ExtraTokens = ExtraTokens()
    origin: TemplateOrigin = TemplateOrigin.NONE
    problem: str = ""
    """Why what the object says is not in use."""

    def template_for(self, *, tools: bool) -> str | None:
        return self.tool_template or self.template if tools else self.template

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether the answers may begin with reasoning in `<think>` tags: the template knows the tags."""
        return "</think>" in (self.template or "")

    @functools.cached_property
    def report(self) -> ChatReport:
        """What is in use, for the status."""
        digest = None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()
        return ChatReport(
            template=self.origin,
            template_digest=None if digest is None else f"sha256:{digest}",
            stop_tokens=list(self.stop_tokens),
            problem=self.problem or None,
        )
