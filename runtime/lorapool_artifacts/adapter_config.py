"""Parses `adapter_config.json` with a strict model of its own, never through peft.

The operator's check and the runtime's weights reader take rank and scaling of each module from here, so that what is
computed is what was checked. It is an allow-list: a setting that changes the computation and is not supported is
refused when it is switched on (`peft_settings` holds the reasons); an unknown setting is refused unless it is empty.
Regular expressions of users are matched by `pattern`, in bounded time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorapool_api.common import FailureReason
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.module_names import Names, PerModule
from lorapool_artifacts.pattern import MAX_CHARS, PatternError
from lorapool_artifacts.peft_settings import HARMLESS, INITIALIZATIONS, KINDS, LORA, REFUSED, REFUSED_INITIALIZATIONS
from lorapool_artifacts.settings import MAX_JSON_BYTES, MIB

_ALL_LINEAR = "all-linear"
_MAX_CONFIG_BYTES = 1 * MIB

_LAYERS_PATTERN = re.compile(r"^[A-Za-z0-9_]{1,64}$")


class AdapterConfig(BaseModel):
    """The settings of a LoRA adapter that determine its computation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1, le=65_536)
    lora_alpha: int | float = Field(gt=0, lt=1e6)
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    ensure_weight_tying: bool = False
    """The output layer has the embedding's adapter, transposed, although target_modules does not name it."""

    def rank_of(self, module: str) -> int:
        """Rank of one module, by its full name in the base (`model.layers.0.self_attn.q_proj`)."""
        return int(_of(self._ranks, module, self.r))

    def scaling_of(self, module: str) -> float:
        """The factor of B·A in one module: alpha/r, or alpha/sqrt(r) with rank-stabilised LoRA."""
        alpha, rank = float(_of(self._alphas, module, self.lora_alpha)), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def meaning(self) -> str:
        """A key that is equal for settings with the same computation and modules, whatever base they name."""
        settings = self.model_dump(exclude={"base_model_name_or_path"})
        if isinstance(self.target_modules, list):
            settings["target_modules"] = sorted(self.target_modules)  # peft writes a set
        settings["target_parameters"] = sorted(self.target_parameters or ())
        return json.dumps(settings)  # the order within patterns matters, so nothing else is sorted

    def targets(self, module: str) -> bool | None:
        """Whether the settings target this linear layer; None when an expression that is not supported decides."""
        excluded = self._excluded.match(module)
        if excluded:
            return False
        named = self._named(module)
        return named if named is False or excluded is False else None

    def _named(self, module: str) -> bool | None:
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == _ALL_LINEAR or self._targets.match(module)
        return self._targets.whole(module) or bool(self._targets.match(module) and self._in_layers(module))

    @cached_property
    def _targets(self) -> Names:
        return Names(self.target_modules or [])

    @cached_property
    def _excluded(self) -> Names:
        return Names(self.exclude_modules or [])

    @cached_property
    def _ranks(self) -> PerModule:
        return PerModule(self.rank_pattern)

    @cached_property
    def _alphas(self) -> PerModule:
        return PerModule(self.alpha_pattern)

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


def _of(table: PerModule, module: str, default: float) -> float:
    try:
        value = table.value(module)
    except PatternError as error:
        raise ArtifactError(
            FailureReason.INCOMPATIBLE,
            f"adapter_config.json: rank_pattern or alpha_pattern cannot be applied to {module}: {error}; write plain "
            "module names instead.",
        ) from error
    return default if value is None else value


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
    """Refuses `auto_map` at any depth: it names code in the repository, which some loaders run even when disabled.

    Raises ArtifactError.
    """
    pending: list[Any] = [document]
    while pending:
        item = pending.pop()
        if isinstance(item, Mapping):
            if item.get("auto_map"):
                raise ArtifactError(
                    FailureReason.UNSUPPORTED_FORMAT,
                    f"{name} names code of its own (auto_map), which is never run; remove auto_map and use an "
                    "architecture that transformers contains.",
                )
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _supported(document: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings that determine the computation. Raises ArtifactError for a setting that the tables refuse."""
    kind = document.get("peft_type")
    if kind != LORA:
        known = KINDS.get(kind) if isinstance(kind, str) else None
        does = f", which {known.why}" if known else ""
        raise _refused(
            f"{name}: peft_type is {_short(kind)}{does}; only LoRA adapters are served",
            known.remedy if known else "train with peft's LoraConfig",
        )
    _check_initialization(document.get("init_lora_weights", True), name)
    if document.get("bias", "none") != "none":
        raise _refused(
            f"{name}: bias={_short(document['bias'])} trains biases of the base, which all adapters share",
            'train it again with bias="none"',
        )
    kept = {}
    for key, value in document.items():
        if key in AdapterConfig.model_fields:
            kept[key] = value
        elif key in REFUSED:
            if _is_on(value):
                raise _refused(
                    f"{name}: {key} is set ({REFUSED[key].why}), which is not supported", REFUSED[key].remedy
                )
        elif key not in HARMLESS and key not in ("bias", "init_lora_weights") and _is_on(value):
            raise _refused(
                f"{name}: the setting {_short(key)} is unknown, so it cannot be ignored safely",
                f"train the adapter without it, or remove it from {name} if it only affects training",
            )
    return kept


def _refused(what: str, remedy: str) -> ArtifactError:
    return ArtifactError(FailureReason.INCOMPATIBLE, f"{what}; {remedy}.")


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {})


def _check_initialization(value: Any, name: str) -> None:
    """Refuses initializations that change the base's weights: such an adapter is wrong on the original base."""
    if isinstance(value, bool) or value is None:
        return
    method = value.lower() if isinstance(value, str) else ""
    if method in INITIALIZATIONS:
        return
    known = REFUSED_INITIALIZATIONS.get("pissa" if method.startswith("pissa_niter_") else method)
    raise _refused(
        f"{name}: init_lora_weights={_short(value)} {known.why if known else 'is unknown'}",
        known.remedy if known else "train it again with init_lora_weights=True",
    )


def _check_patterns(config: AdapterConfig, name: str) -> None:
    for field, expression in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(expression, str):
            _check_expression(name, field, expression)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key, value in patterns.items():
            if not 0 < value < 1e6:
                raise ArtifactError(
                    FailureReason.INCOMPATIBLE, f"{name}: {field} of {_short(key)} is {value}; it must be positive."
                )
        try:
            PerModule(patterns)
        except PatternError as error:
            raise _refused(
                f"{name}: {field} holds a regular expression that is not supported ({error})",
                "write plain module names instead",
            ) from error
    given = config.layers_pattern or []
    for key in [given] if isinstance(given, str) else given:
        if not _LAYERS_PATTERN.match(key):
            raise _pattern_error(name, "layers_pattern", key)
    if not (config.target_modules or config.target_parameters):
        raise ArtifactError(
            FailureReason.INCOMPATIBLE, f"{name}: target_modules is empty; name the modules that were trained."
        )


def _check_expression(name: str, field: str, expression: str) -> None:
    try:
        if len(expression) > MAX_CHARS:
            raise re.error(f"it is longer than {MAX_CHARS} characters")
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
    """Last parts of module names, sorted and without duplicates, as shown in `status.targetModules`."""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))
