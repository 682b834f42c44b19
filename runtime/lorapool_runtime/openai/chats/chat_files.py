"""What the folder of an adapter says about chats: template, tokens and the ends of answers. Pure but for reading files.

Only JSON and the template's text are read, each within a bound. What the files say is checked against the base by
`chat_formats`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG
from lorapool_artifacts.settings import MAX_JSON_BYTES
from lorapool_runtime.openai.chats.chat_format import AddedToken

MAX_TEMPLATE_BYTES = 256 * 1024
_TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class ChatFiles:
    """What an adapter's files say. Empty for an adapter without such files."""

    template: str | None = None
    tool_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    """`eos_token` and the like, as its tokenizer names them."""
    eos_ids: frozenset[int] = frozenset()
    """Of its generation config."""
    added: tuple[AddedToken, ...] = ()
    """As its tokenizer_config.json lists them; its tokenizer.json, if there is one, lists all."""
    tokenizer: Path | None = None


NO_FILES = ChatFiles()


def read_chat_files(folder: Path) -> ChatFiles:
    """Blocks. Raises ArtifactError for a file that is damaged or too long."""
    config = _json(folder / TOKENIZER_CONFIG)
    template, tool_template = _templates(folder / CHAT_TEMPLATE, config.get("chat_template"))
    tokenizer = folder / TOKENIZER
    return ChatFiles(
        template=template,
        tool_template=tool_template,
        special_tokens={name: text for name in _TOKEN_NAMES if (text := _token_text(config.get(name))) is not None},
        eos_ids=_ids(_json(folder / GENERATION_CONFIG).get("eos_token_id")),
        added=_added(config.get("added_tokens_decoder")),
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_bytes(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        raise _damaged(path, "is not valid JSON") from None
    if not isinstance(value, dict):
        raise _damaged(path, "is not a JSON object")
    return value


def _bytes(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ArtifactError(
            FailureReason.TOO_LARGE,
            f"The adapter's {path.name} is longer than {most} bytes, the most that a runtime reads; shorten it, or "
            "remove it and set spec.chatTemplate.",
        )
    return raw


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.CORRUPT_ARTIFACT,
        f"The adapter's {path.name} {why}; save it again, or remove the file.",
    )


def _templates(path: Path, configured: Any) -> tuple[str | None, str | None]:
    """The template, and the one for conversations with tools where there are several."""
    if path.is_file():
        return _interned(_bytes(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")), None
    if isinstance(configured, str):
        return _interned(configured), None
    return template_of_several(named_templates(configured))


def named_templates(value: Any) -> Mapping[str, str]:
    """Templates by name, from either form in which tokenizers store several."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if not isinstance(value, Mapping):
        return {}
    return {name: text for name, text in value.items() if isinstance(name, str) and isinstance(text, str)}


def template_of_several(named: Mapping[str, str]) -> tuple[str | None, str | None]:
    default, tools = named.get("default"), named.get("tool_use")
    return _interned(default), _interned(tools) if default is not None else None


def _interned(text: str | None) -> str | None:
    """Equal templates of many adapters are in memory once."""
    return sys.intern(text) if text else None


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _ids(value: Any) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(item for item in values if isinstance(item, int) and not isinstance(item, bool) and item >= 0)


def _added(value: Any) -> tuple[AddedToken, ...]:
    if not isinstance(value, dict):
        return ()
    return added_tokens({"id": int(key), **token} for key, token in value.items()
                        if key.isdecimal() and len(key) < 10 and isinstance(token, dict))  # fmt: skip


def added_tokens(found: Any) -> tuple[AddedToken, ...]:
    """Added tokens as tokenizer.json lists them."""
    return tuple(
        AddedToken(
            token["id"],
            token["content"],
            bool(token.get("special")),
            bool(token.get("lstrip")),
            bool(token.get("rstrip")),
        )
        for token in found
        if isinstance(token.get("id"), int) and isinstance(token.get("content"), str) and token["content"]
    )
