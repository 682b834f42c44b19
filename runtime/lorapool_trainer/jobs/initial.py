"""An adapter whose training is continued, read from its files.

Its chat template and tokens go into the result.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorapool_api.common import FileDigest, artifact_digest
from lorapool_artifacts.checks.adapter_config import AdapterConfig, read_adapter_config
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHAT_FILES

_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")


class InitialAdapterError(ValueError):
    """The adapter of `initFrom` cannot be continued; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Full names of the changed layers, sorted."""
    tensors: Mapping[str, Tensor]
    """By their names in peft's file."""
    chat_files: Mapping[str, bytes]
    """Template, tokenizer and generation config that it brings, by file name."""
    digest: str
    """`artifact_digest` of the files that are used."""


def read_initial(folder: Path) -> InitialAdapter:
    """Reads an adapter's folder, as peft saves it. Blocks. Raises InitialAdapterError and OSError."""
    config = _config(folder)
    try:
        tensors = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise InitialAdapterError(f"{ADAPTER_WEIGHTS} of the adapter to continue is damaged: {error}") from error
    modules = tuple(sorted({_module(name) for name in tensors}))
    shapes = {(config.rank_of(module), config.scaling_of(module)) for module in modules}
    if len(shapes) != 1:
        raise InitialAdapterError(
            "the adapter to continue has several ranks or scales (rank_pattern, alpha_pattern), and only one of each "
            "can be trained; begin with the base instead"
        )
    ((rank, scale),) = shapes
    present = {name: folder / name for name in CHAT_FILES if (folder / name).is_file()}
    chat_files = {name: path.read_bytes() for name, path in present.items()}
    used = [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS, *present.values()]
    digest = artifact_digest(_file_digest(path) for path in used)
    return InitialAdapter(rank, scale * rank, modules, tensors, chat_files, digest)


def _file_digest(path: Path) -> FileDigest:
    with path.open("rb") as file:
        return FileDigest(path.name, path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _config(folder: Path) -> AdapterConfig:
    try:
        config, problems = read_adapter_config((folder / ADAPTER_CONFIG).read_bytes())
    except ArtifactError as error:
        raise _refused(error) from error
    if problems:
        raise _refused(problems[0])
    assert config is not None, "without problems there is a config"
    return config


def _refused(error: ArtifactError) -> InitialAdapterError:
    return InitialAdapterError(f"the adapter to continue is refused: {error.message.removesuffix('.')}")


def _module(name: str) -> str:
    found = _MATRIX.fullmatch(name)
    if found is None:
        raise InitialAdapterError(
            f"the adapter to continue has the tensor {name}, and only A and B of linear layers can be trained; "
            "begin with the base instead"
        )
    return found[1]
