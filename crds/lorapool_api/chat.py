"""How a model is talked to: the chat template and the stop tokens, as objects set them and as runtimes report them."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from lorapool_api.common import ApiModel

MAX_TEMPLATE_CHARS = 32_768
"""Longest template in an object. The longest in use have 20,000 characters; each is in memory once per runtime."""
MAX_STOP_TOKENS = 16


class TemplateUse(StrEnum):
    """Whose files a chat template is taken from."""

    SOURCE = "Source"
    BASE = "Base"


class TemplateOrigin(StrEnum):
    """Where the chat template that is in use comes from."""

    SPEC = "Spec"
    """The object's spec.chatTemplate.inline."""
    SOURCE = "Source"
    """The files of the object's source."""
    BASE = "Base"
    """The base's, for an adapter."""
    NONE = "None"
    """The model has none: chat requests are refused."""


def _one_of(*names: str) -> dict[str, Any]:
    rule = " != ".join(f"has(self.{name})" for name in names)
    message = f"exactly one of {' and '.join(names)} must be set"
    return {"x-kubernetes-validations": [{"rule": rule, "message": message}]}


Template = Annotated[str, Field(min_length=1, max_length=MAX_TEMPLATE_CHARS)]


class BaseChatTemplate(ApiModel):
    """The chat template of a base."""

    inline: Template = Field(description="The template, in Jinja as transformers renders it.")


class ChatTemplate(ApiModel):
    """The chat template of an adapter."""

    model_config = ConfigDict(json_schema_extra=_one_of("inline", "from"))

    inline: Template | None = Field(default=None, description="The template, in Jinja as transformers renders it.")
    use: TemplateUse | None = Field(
        default=None,
        alias="from",
        description="Source: the adapter's files must have a template, which is used. Base: the base's is used, "
        "whatever the adapter's files have.",
    )


class Generation(ApiModel):
    """How answers end."""

    stop_tokens: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        min_length=1,
        max_length=MAX_STOP_TOKENS,
        description='Texts of tokens that end an answer, such as "<|im_end|>". They replace those that the files of an '
        "adapter name in generation_config.json and tokenizer_config.json; those that the base's files name always end "
        "an answer.",
    )


def chat_hash(template: ChatTemplate | None, generation: Generation | None) -> str:
    """Identifies what an adapter's object says about chats; empty where it says nothing."""
    if template is None and generation is None:
        return ""
    said = [None if part is None else part.model_dump_json() for part in (template, generation)]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


class ChatReport(ApiModel):
    """The chat template and the stop tokens that a runtime uses."""

    template: TemplateOrigin = Field(
        description="Where the chat template comes from: Spec, Source, Base, or None if there is none."
    )
    template_digest: str | None = Field(default=None, max_length=80, description="Digest of the template's text.")
    stop_tokens: list[Annotated[str, Field(max_length=256)]] = Field(
        default_factory=list, max_length=64, description="Texts of the tokens that end an answer."
    )
    problem: str | None = Field(
        default=None, max_length=1024, description="Why spec.chatTemplate or spec.generation is not in use."
    )
