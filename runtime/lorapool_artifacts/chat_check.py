"""Checks an adapter's chat files, for commands in an environment in which the runtime is installed too.

Templates and tokenizers are the runtime's business; this package knows them only through the runtime's own code.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import BASE_CONFIG, CHAT_FILES, GENERATION_CONFIG, TOKENIZER_FILES
from lorapool_artifacts.sources import Source, download

_RUNTIME = "lorapool_runtime.openai.chats.check"
_BASE_FILES = {*TOKENIZER_FILES, BASE_CONFIG, GENERATION_CONFIG}


def chat_refusal(adapter: Source, base: Source | None, config: Mapping[str, object]) -> ArtifactError | None:
    """Why a runtime would refuse the adapter's chat files; `config`: the base's config.json.

    None where the runtime is not installed. Copies the files, and may take seconds. Raises ArtifactError for a source.
    """
    try:
        runtime = importlib.import_module(_RUNTIME)
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        mine, its = Path(folder) / "adapter", Path(folder) / "base"
        if not _copy(adapter, CHAT_FILES, mine):
            return None
        if base is not None:
            _copy(base, _BASE_FILES, its)
        try:
            runtime.check_chat_files(mine, None if base is None else its, _rows(config))
        except ArtifactError as error:
            return error
    return None


def _copy(source: Source, names: Collection[str], into: Path) -> int:
    """Copies those of the files that the source has; returns their number."""
    into.mkdir()
    found = [file.name for file in source.list_files() if file.name in names]
    for name in found:
        with (into / name).open("wb") as file:
            download(source, name, file)
    return len(found)


def _rows(config: Mapping[str, object]) -> int:
    """Rows of the base's embedding, by its settings or those of its text model."""
    text = config.get("text_config")
    found = config.get("vocab_size", text.get("vocab_size") if isinstance(text, Mapping) else None)
    return found if isinstance(found, int) else 0
