"""peft's adapter_config.json, parsed by our own model: what is understood, what is refused and in which words.

`adapter_file` calls it. peft itself is never handed a folder. A key that is not known is refused unless it is
unset, since nobody can say what it would change.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorapool_api.common import FailureReason
from lorapool_runtime.interface import AdapterArtifactError

T = TypeVar("T", int, float)

_ALL_LINEAR = "all-linear"
_MAX_CONFIG_BYTES = 1 << 20
_MAX_PATTERN_CHARS = 512

# They say how the adapter was made, not how it is computed.
_NO_EFFECT = frozenset(
    {
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)

# The ways to start training that leave the base as it is.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")

_REMEDIES = {
    "use_dora": "DoRA adapters are not supported: train it again with use_dora=False",
    "modules_to_save": "adapters that bring whole trained modules (modules_to_save) are not supported: "
    "train it again without modules_to_save",
    "lora_bias": "adapters with trained biases are not supported: train it again with lora_bias=False",
    "trainable_token_indices": "adapters with trained token embeddings are not supported: "
    "train it again without trainable_token_indices",
    "layer_replication": "adapters that replicate layers of the base are not supported: "
    "train it again without layer_replication",
    "target_parameters": "adapters that target bare parameters are not supported: "
    "train it again with target_modules only",
    "fan_in_fan_out": "fan_in_fan_out adapters (Conv1D layers) are not supported: this base has linear layers",
}


class AdapterConfig(BaseModel):
    """The part of peft's LoraConfig that decides what the adapter computes."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    r: int = Field(ge=1)
    lora_alpha: float = Field(allow_inf_nan=False)
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether peft would have put the adapter on this linear layer of the base."""
        if _named(self.exclude_modules or [], module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == _ALL_LINEAR or _fullmatch(self.target_modules, module)
        return _named(self.target_modules, module) and self._layer_is_chosen(module)

    def _layer_is_chosen(self, module: str) -> bool:
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for prefix in [rf"(?:^|.*?\.){p}\." for p in patterns or []] or [r".*?\.[^.]*\."]:
            match = re.match(prefix + r"(?P<index>\d+)\.", module)
            if match is not None:
                return int(match["index"]) in ([wanted] if isinstance(wanted, int) else wanted)
        return False


def read_config(folder: Path) -> AdapterConfig:
    """Raises AdapterArtifactError."""
    try:
        raw = (folder / "adapter_config.json").read_bytes()
    except OSError as error:
        raise AdapterArtifactError(
            FailureReason.UNSUPPORTED_FORMAT, "there is no readable adapter_config.json: save the adapter with peft"
        ) from error
    try:
        document = json.loads(raw) if len(raw) <= _MAX_CONFIG_BYTES else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise AdapterArtifactError(FailureReason.CORRUPT_ARTIFACT, "adapter_config.json is not a JSON object")
    _refuse_other_kinds(document)
    try:
        config = AdapterConfig.model_validate(document)
        _check_patterns(config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise AdapterArtifactError(
            FailureReason.CORRUPT_ARTIFACT, f"adapter_config.json: {where}: {first['msg']}"
        ) from error
    except re.error as error:
        raise AdapterArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"adapter_config.json holds a bad regular expression: {error}",
        ) from error
    return config


def _refuse_other_kinds(document: dict[str, Any]) -> None:
    kind = document.get("peft_type")
    if kind != "LORA":
        raise AdapterArtifactError(
            FailureReason.INCOMPATIBLE,
            f"adapters of peft_type {kind!r} are not supported: train a LoRA",
        )
    if document.get("bias", "none") != "none":
        raise AdapterArtifactError(
            FailureReason.INCOMPATIBLE,
            'trained biases are not supported: train it again with bias="none"',
        )
    start = document.get("init_lora_weights", True)
    if start not in _STARTS:
        raise AdapterArtifactError(
            FailureReason.INCOMPATIBLE,
            f"init_lora_weights={start!r} changes the base's own weights: convert the adapter when saving it "
            "(peft's path_initial_model_for_weight_conversion)",
        )
    known = _NO_EFFECT | AdapterConfig.model_fields.keys() | {"peft_type", "bias", "init_lora_weights"}
    for name, value in document.items():
        if name in known or not value:
            continue
        remedy = _REMEDIES.get(name, f"adapter_config.json sets {name!r}, which is not supported: train it without")
        raise AdapterArtifactError(FailureReason.INCOMPATIBLE, remedy)


def _check_patterns(config: AdapterConfig) -> None:
    """Compiles every pattern once, so that a bad one is refused here and by name."""
    single = [p for p in (config.target_modules, config.exclude_modules) if isinstance(p, str)]
    layers = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern or []
    for pattern in (*single, *layers, *config.rank_pattern, *config.alpha_pattern):
        if len(pattern) > _MAX_PATTERN_CHARS:
            raise re.error(f"longer than {_MAX_PATTERN_CHARS} characters")
        re.compile(pattern)


def _by_pattern(patterns: dict[str, T], module: str, default: T) -> T:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _named(names: str | Iterable[str], module: str) -> bool:
    if isinstance(names, str):
        return _fullmatch(names, module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _fullmatch(pattern: str, module: str) -> bool:
    return re.fullmatch(pattern, module) is not None
