"""What the runtime has to know of a base that vLLM computes: from its files, without its weights.

transformers says which modules adapters may name, as for the torch engine; vLLM says which of them it can adapt. A
quantized base has the same modules, because the model is made from its settings and not from the shapes in its files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.inspect import base_files_from_folder
from lorapool_runtime.engines.errors import EngineStartError, UnsupportedBaseError
from lorapool_runtime.engines.interface import TargetShape
from lorapool_runtime.weights.targets import TargetGroup

_TOKENIZER = "tokenizer.json"
_LAYERS = re.compile(r"(?:^|\.)(layers\.\d+\..*)$")


@dataclass(frozen=True, slots=True)
class BaseFolder:
    """Of the base's files."""

    modules: tuple[BaseModule, ...]
    max_positions: int | None
    eos_token_ids: frozenset[int]
    has_tokenizer: bool

    def context(self, wanted: int | None) -> int:
        """Tokens of prompt and completion together, at most `wanted`. Raises UnsupportedBaseError."""
        limits = [one for one in (wanted, self.max_positions) if one is not None]
        if not limits:
            raise UnsupportedBaseError("config.json has no max_position_embeddings: set spec.maxModelLen.")
        return min(limits)

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The last parts of the names of its linear layers, sorted."""
        return tuple(
            sorted({module.name.rpartition(".")[2] for module in self.modules if module.kind is ModuleKind.LINEAR})
        )


@dataclass(frozen=True, slots=True)
class Adaptable:
    """The modules that vLLM can adapt."""

    modules: tuple[BaseModule, ...]
    vllm_names: Mapping[str, str]
    """vLLM's name of each module."""

    @property
    def groups(self) -> tuple[TargetGroup, ...]:
        return tuple(TargetGroup((module.name,), module.in_features, (module.out_features,)) for module in self.modules)

    @property
    def targets(self) -> tuple[TargetShape, ...]:
        return tuple(shape for group in self.groups for shape in group.shapes())


def read_base(folder: Path) -> BaseFolder:
    """Takes seconds. Raises ArtifactError for a damaged folder, UnsupportedBaseError for settings unknown here."""
    from lorapool_runtime.engines.torch.model.without_weights import modules_of

    files = base_files_from_folder(folder)
    text = files.config.get("text_config")
    settings: Mapping[str, Any] = text if isinstance(text, Mapping) else files.config
    positions = settings.get("max_position_embeddings")
    try:
        modules = modules_of(files.config, files.shapes)
    except (ArtifactError, EngineStartError):
        raise
    except Exception as error:  # whatever transformers raises
        raise UnsupportedBaseError(
            f"transformers does not make this base here ({' '.join(str(error).split())[:200]}): correct its "
            "config.json, or choose a base that docs/reference/models.md lists as served."
        ) from error
    return BaseFolder(
        modules=modules,
        max_positions=positions if isinstance(positions, int) else None,
        eos_token_ids=_eos_token_ids(folder, settings),
        has_tokenizer=(folder / _TOKENIZER).is_file(),
    )


def adaptable(modules: Sequence[BaseModule], layers: Iterable[str]) -> Adaptable:
    """The linear layers among the modules that are among vLLM's layers too, which may have another prefix.

    Raises UnsupportedBaseError where there is none.
    """
    by_name = {name: name for name in layers}
    by_layer: dict[str, list[str]] = {}
    for name in by_name:
        if (found := _LAYERS.search(name)) is not None:
            by_layer.setdefault(found[1], []).append(name)
    names: dict[str, str] = {}
    for module in modules:
        if module.kind is not ModuleKind.LINEAR:
            continue
        spelled = next((by_name[name] for name in (module.name, *module.aliases) if name in by_name), None)
        layer = _LAYERS.search(module.name)
        if spelled is None and layer is not None and len(by_layer.get(layer[1], ())) == 1:
            [spelled] = by_layer[layer[1]]
        if spelled is not None:
            names[module.name] = spelled
    if not names:
        raise UnsupportedBaseError(
            "vLLM has no linear layer of this base that LoRA could target: serve it with the torch engine."
        )
    return Adaptable(tuple(module for module in modules if module.name in names), names)


def _eos_token_ids(folder: Path, settings: Mapping[str, Any]) -> frozenset[int]:
    value = settings.get("eos_token_id")
    generation = folder / "generation_config.json"
    if generation.is_file():
        own = json.loads(generation.read_bytes()).get("eos_token_id")
        value = value if own is None else own
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, list) else [value])
