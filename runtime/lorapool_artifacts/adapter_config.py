"""`adapter_config.json` by an own strict model, never through peft.

Called by `inspect` and by the runtime's `adapter_file`, which takes rank and scaling of each module from
here so that what was judged is what is computed. An allow-list: a setting that changes the maths and is
not supported is refused when it is switched on; a setting nobody knows is refused unless it is empty.
User-written regular expressions are compiled but never run: one of them can hold a process for hours.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.limits import MAX_JSON_BYTES, MIB

_ALL_LINEAR = "all-linear"
_MAX_CONFIG_BYTES = 1 * MIB
_MAX_PATTERN_CHARS = 512

_PATTERN_KEY = re.compile(r"^\^?[A-Za-z0-9_.]{1,256}$")
_LAYERS_PATTERN = re.compile(r"^[A-Za-z0-9_]{1,64}$")
_NO_EFFECT_ON_BASE = frozenset({"gaussian", "eva", "orthogonal"})

_IGNORED = frozenset(
    {
        "auto_mapping",  # class names of the trainer's model; nothing is imported from them
        "inference_mode", "lora_dropout", "peft_version", "revision", "task_type", "runtime_config",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # how training started; see init_lora_weights
        "megatron_core", "qalora_group_size", "ensure_weight_tying",
    }
)  # fmt: skip

_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "fan_in_fan_out": "Conv1D layers",
    "kasa_config": "KaSA",
    "layer_replication": "replicated layers of the base",
    "lora_bias": "trained biases in LoRA layers",
    "megatron_config": "Megatron layers",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "embeddings of trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
_REMEDIES = {
    "fan_in_fan_out": "train it on a base with linear layers",
    "lora_bias": "train it again with lora_bias=False",
    "target_parameters": "train it again with target_modules only",
    "use_dora": "train it again with use_dora=False",
}
"""Where leaving the setting out says too little."""


class AdapterConfig(BaseModel):
    """The settings of a LoRA adapter that decide what it computes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1, le=65_536)
    lora_alpha: int | float = Field(gt=0, lt=1e6)
    target_modules: list[str] | str
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None

    def rank_of(self, module: str) -> int:
        """Rank of one module, by its full name in the base (`model.layers.0.self_attn.q_proj`)."""
        return int(_match(self.rank_pattern, module, self.r))

    def scaling_of(self, module: str) -> float:
        """What B·A is multiplied by in one module: alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA."""
        alpha, rank = float(_match(self.alpha_pattern, module, self.lora_alpha)), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool | None:
        """Whether the settings name this linear layer; None when only a regular expression could tell."""
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() != _ALL_LINEAR:
                return None
        elif not _names(self.target_modules, module) or not self._in_layers(module):
            return False
        if isinstance(self.exclude_modules, str):
            return None
        return not _names(self.exclude_modules or [], module)

    def _in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None or self.layers_to_transform == []:
            return True
        wanted = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        forms = [rf"(?:^|.*?\.){re.escape(pattern)}\.(\d{{1,6}})\." for pattern in patterns] or [
            r".*?\.[^.]*\.(\d{1,6})\."
        ]
        for form in forms:
            if found := re.match(form, module):
                return int(found[1]) in wanted
        return False


def _names(keys: Iterable[str], module: str) -> bool:
    return any(module == key or module.endswith(f".{key}") for key in keys)


def _match(patterns: Mapping[str, int | float], module: str, default: float) -> float:
    """peft's rule: the first key that is the module's name or its end; `^` anchors at the start."""
    for key, value in patterns.items():
        if module == key.removeprefix("^") or (not key.startswith("^") and module.endswith(f".{key}")):
            return value
    return default


def parse_adapter_config(raw: bytes, *, name: str = "adapter_config.json") -> AdapterConfig:
    """The settings in `raw`. Raises ArtifactError naming the setting and the remedy."""
    document = load_json_object(raw, name=name, max_bytes=_MAX_CONFIG_BYTES)
    refuse_code(document, name=name)
    settings = _supported(document, name)
    try:
        config = AdapterConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])[:100]
        raise ArtifactError(
            FailureReason.INCOMPATIBLE,
            f"{name}: {field}: {first['msg']}. Save the adapter with peft's save_pretrained().",
        ) from error
    _check_patterns(config, name)
    return config


def load_json_object(raw: bytes, *, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a bounded file. Raises ArtifactError."""
    if len(raw) > max_bytes:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT, f"{name} is longer than {max_bytes} bytes; upload the original file."
        )
    try:
        document = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(FailureReason.CORRUPT_ARTIFACT, f"{name} is not valid JSON; upload it again.") from error
    if not isinstance(document, dict):
        raise ArtifactError(FailureReason.CORRUPT_ARTIFACT, f"{name} is not a JSON object; upload it again.")
    return document


def refuse_code(document: Mapping[str, Any], *, name: str) -> None:
    """`auto_map` names code of the repository; loaders have run it although told not to. Refused at any depth."""
    pending: list[Any] = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            if item.get("auto_map"):
                raise ArtifactError(
                    FailureReason.UNSUPPORTED_FORMAT,
                    f"{name} names code of its own (auto_map), which is never run; remove auto_map and use an "
                    "architecture transformers ships.",
                )
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _supported(document: dict[str, Any], name: str) -> dict[str, Any]:
    kind = document.get("peft_type")
    if kind != "LORA":
        raise ArtifactError(
            FailureReason.INCOMPATIBLE,
            f"{name}: peft_type is {_short(kind)}; only LoRA adapters are served. Train with peft's LoraConfig.",
        )
    _check_start(document.get("init_lora_weights", True), name)
    if document.get("bias", "none") != "none":
        raise ArtifactError(
            FailureReason.INCOMPATIBLE,
            f'{name}: trained biases (bias={_short(document["bias"])}) are not supported; train with bias="none".',
        )
    kept = {}
    for key, value in document.items():
        if key in AdapterConfig.model_fields:
            kept[key] = value
        elif key in _UNSUPPORTED:
            if _is_on(value):
                raise ArtifactError(
                    FailureReason.INCOMPATIBLE,
                    f"{name}: {key} is set ({_UNSUPPORTED[key]}), which is not supported; "
                    f"{_REMEDIES.get(key, f'train it again without {key}')}.",
                )
        elif key not in _IGNORED and key not in ("bias", "init_lora_weights") and _is_on(value):
            raise ArtifactError(
                FailureReason.INCOMPATIBLE,
                f"{name}: the setting {_short(key)} is not known here, so it cannot be left out safely; train the "
                "adapter without it.",
            )
    return kept


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {})


def _check_start(value: Any, name: str) -> None:
    """PiSSA, OLoRA, CorDA, LoftQ and others change the base's weights; such an adapter is wrong on the true base."""
    if isinstance(value, bool) or value is None or (isinstance(value, str) and value in _NO_EFFECT_ON_BASE):
        return
    raise ArtifactError(
        FailureReason.INCOMPATIBLE,
        f"{name}: init_lora_weights={_short(value)} trains against changed base weights; convert the adapter with "
        "save_pretrained(path_initial_model_for_weight_conversion=...).",
    )


def _check_patterns(config: AdapterConfig, name: str) -> None:
    for field, expression in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(expression, str):
            _check_expression(name, field, expression)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key, value in patterns.items():
            if not _PATTERN_KEY.match(key):
                raise _pattern_error(name, field, key)
            if not 0 < value < 1e6:
                raise ArtifactError(
                    FailureReason.INCOMPATIBLE, f"{name}: {field} of {_short(key)} is {value}; it must be positive."
                )
    given = config.layers_pattern or []
    for key in [given] if isinstance(given, str) else given:
        if not _LAYERS_PATTERN.match(key):
            raise _pattern_error(name, "layers_pattern", key)
    if not config.target_modules:
        raise ArtifactError(
            FailureReason.INCOMPATIBLE, f"{name}: target_modules is empty; name the modules that were trained."
        )


def _check_expression(name: str, field: str, expression: str) -> None:
    try:
        if len(expression) > _MAX_PATTERN_CHARS:
            raise re.error(f"it is longer than {_MAX_PATTERN_CHARS} characters")
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT,
            f"{name}: {field} holds the bad regular expression {_short(expression)}: {error}; save the adapter again "
            "with peft's save_pretrained().",
        ) from error


def _pattern_error(name: str, field: str, key: str) -> ArtifactError:
    return ArtifactError(
        FailureReason.INCOMPATIBLE,
        f"{name}: {field} holds the regular expression {_short(key)}; write plain module names instead.",
    )


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:79] + "…"


def suffixes(modules: Iterable[str]) -> tuple[str, ...]:
    """Last parts of module names, sorted: what `status.targetModules` shows."""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))
