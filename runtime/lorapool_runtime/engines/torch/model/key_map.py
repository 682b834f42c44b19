"""Maps the names in a base's files to those of the loaded model, by transformers' own rules.

transformers renames keys when it loads a checkpoint, adds or removes the prefix of the base model, and joins the
experts of a mixture. peft applies the same rules to the names in an adapter, so that one module has several names.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

MAX_NAMES = 16
"""Spellings of one key; real models have up to six."""


class KeyMap:
    """The rules for one model, which may be on the meta device."""

    def __init__(self, model: Any, file_keys: Iterable[str] = ()) -> None:
        """file_keys: all keys in the base's files."""
        transforms = get_model_conversion_mapping(model)
        self._renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        self._converters = [item for item in transforms if isinstance(item, WeightConverter)]
        self._reversed = [item.reverse_transform() for item in reversed(self._renamings)]
        self._prefix: str = model.base_model_prefix
        self._state: dict[str, Any] = dict.fromkeys(model.state_dict(), True)  # its tensors would keep the weights
        self._text = text_prefix(model)
        self._in_files: dict[str, set[str]] = {}
        for key in file_keys:
            if (loaded := self.loaded(key)) is not None:
                self._in_files.setdefault(loaded, set()).add(key)

    def loaded(self, key: str) -> str | None:
        """The key of the loaded model into which this one of a file is read unchanged; None where there is none."""
        renamed, converter = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if renamed not in self._state and key in self._state:
            renamed, converter = rename_source_key(key, [], [], self._prefix, self._state)
        return renamed if renamed in self._state and converter is None else None

    def spellings(self, key: str) -> tuple[str, ...]:
        """The other keys that stand for this one of the loaded model, sorted."""
        found = {key}
        for renaming in self._reversed:
            found |= {renaming.rename_source_key(name)[0] for name in found}
        found |= {name.removeprefix(f"{self._prefix}.") for name in found} | {f"{self._prefix}.{key}"}
        valid = {name for name in found if self.loaded(name) == key} | self._in_files.get(key, set())
        return tuple(sorted((valid | self._of_text_model(key)) - {key}))[:MAX_NAMES]

    def _of_text_model(self, key: str) -> set[str]:
        """The name in the text model that was loaded by itself from the same files."""
        if not self._text or not key.startswith(self._text):
            return set()
        alone = f"model.{key.removeprefix(self._text)}"
        return {alone} if alone != key and self.loaded(alone) is None else set()

    @functools.cached_property
    def expert_parts(self) -> dict[str, tuple[str, ...]]:
        """For the last name of each parameter that joins experts: the last names that it joins, in their order."""
        return {
            item.target_patterns[0].rpartition(".")[2]: tuple(_last_name(p) for p in item.source_patterns)
            for item in self._converters
            if len(item.target_patterns) == 1 and ".experts." in item.target_patterns[0]
        }


def text_prefix(model: Any) -> str:
    """The start of the names of the text model inside a multimodal one; empty for a text model."""
    text = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is text), "")
    return f"{name}." if name and name != model.base_model_prefix else ""


def _last_name(pattern: str) -> str:
    """`mlp.experts.*.gate_proj.weight` → `gate_proj`"""
    return pattern.removesuffix(".weight").rpartition(".")[2]
