"""Checks what an adapter's files say about chats without serving it, for `lorapool inspect`."""

from __future__ import annotations

from pathlib import Path

from lorapool_runtime.openai.chats.chat_files import read_chat_files
from lorapool_runtime.openai.chats.chat_formats import ChatFormats
from lorapool_runtime.openai.chats.tokenizer import Tokenizer, TokenizerError

TIMEOUT_S = 30.0


def check_chat_files(adapter: Path, base: Path | None, rows: int) -> None:
    """Raises ArtifactError for what a runtime of the base would refuse; `rows`: of the base's embedding.

    Without a base, or for one without a tokenizer, only the files themselves are checked. Blocks.
    """
    read_chat_files(adapter)
    if base is None:
        return
    try:
        tokenizer = Tokenizer(base, threads=1, timeout_s=TIMEOUT_S)
    except TokenizerError:
        return
    try:
        formats = ChatFormats(tokenizer, rows=rows, eos_ids=())
        formats.of_adapter(formats.read(adapter), None, None)
    finally:
        tokenizer.close()
