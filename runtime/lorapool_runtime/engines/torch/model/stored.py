"""Finds where the base's files have the weights of its embedding and output layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_artifacts.checks.header import HeaderBounds
from lorapool_runtime.engines.torch.model.key_map import KeyMap
from lorapool_runtime.weights.originals import StoredMatrix
from lorapool_runtime.weights.pack import FILE_TYPES
from lorapool_runtime.weights.safetensors_file import open_weights


def stored_matrices(
    model: Any, modules: tuple[BaseModule, ...], files: Mapping[str, StoredMatrix], key_map: KeyMap
) -> Mapping[str, StoredMatrix]:
    """Of the embedding and the output layer, by the name of the module. A tied output layer has the embedding's.

    files: all tensors of the base's files.
    """
    wanted = [module for module in modules if module.kind in (ModuleKind.EMBEDDING, ModuleKind.OUTPUT)]
    names = {f"{name}.weight" for module in wanted for name in (module.name, *module.aliases)} & files.keys()
    readable = [name for name in names if files[name].info.dtype in FILE_TYPES]
    found = {loaded: files[name] for name in readable if (loaded := key_map.loaded(name)) is not None}
    embedding = next((module.name for module in wanted if module.kind is ModuleKind.EMBEDDING), None)
    tied = embedding is not None and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    stored = {module.name: found.get(f"{embedding if tied else module.name}.weight") for module in wanted}
    return {name: matrix for name, matrix in stored.items() if matrix is not None}


def tensors_in(folder: Path) -> Mapping[str, StoredMatrix]:
    """All tensors of a base's files, by their names there. Raises ArtifactError and OSError."""
    found: dict[str, StoredMatrix] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_weights(path, HeaderBounds(max_tensors=2**31)) as file:
            found.update((key, StoredMatrix(path, info)) for key, info in file.header().tensors.items())
    return found
