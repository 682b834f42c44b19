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
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lorapool_artifacts.checks.causes import refusal
from lorapool_artifacts.checks.module_names import Names, PerModule
from lorapool_artifacts.checks.pattern import MAX_CHARS, PatternError
from lorapool_artifacts.checks.peft_settings import (
    GENERATES,
    HARMLESS,
    INITIALIZATIONS,
    KINDS,
    LORA,
    MLX,
    REFUSED,
    REFUSED_INITIALIZATIONS,
)
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.settings import MAX_JSON_BYTES

CONFIG = "adapter_config.json"
_ALL_LINEAR = "all-linear"

_LAYERS_PATTERN = re.compile(r"^[A-Za-z0-9_]{1,64}$")


def _integral(value: object) -> object:
    """A whole number that was written as a float, such as 8.0, as an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Rank = Annotated[int, BeforeValidator(_integral), Field(ge=1, le=65_536)]


class AdapterConfig(BaseModel):
    """The settings of a LoRA adapter that determine its computation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    peft_type: Literal["LORA"]
    r: Rank
    lora_alpha: int | float = Field(gt=0, lt=1e6)
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    base_model_name_or_path: str | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = {}
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
        setting = "rank_pattern or alpha_pattern"
        raise refusal("expression", file=CONFIG, setting=setting, what=f"for {_short(module)}: {error}") from error
    return default if value is None else value


def parse_adapter_config(raw: bytes, *, name: str = CONFIG) -> AdapterConfig:
    """The settings in `raw`. Raises ArtifactError naming the setting and the remedy."""
    config, problems = read_adapter_config(raw, name=name)
    if problems:
        raise problems[0]
    assert config is not None  # otherwise there was a problem
    return config


def read_adapter_config(raw: bytes, *, name: str = CONFIG) -> tuple[AdapterConfig | None, tuple[ArtifactError, ...]]:
    """The settings in `raw` that are supported, and every reason to refuse the others. None: they cannot be read.

    Raises ArtifactError for a file that is no JSON object or names code.
    """
    document = load_json_object(raw, name=name)
    refuse_code(document, name=name)
    problems = [*_kind_problems(document, name), *_setting_problems(document, name)]
    if document.get("peft_type") != LORA:
        return None, tuple(problems)
    try:
        config = AdapterConfig.model_validate({key: document[key] for key in _given(document)})
    except ValidationError as error:
        return None, (*problems, *_value_problems(error, name))
    pattern_problems = tuple(_pattern_problems(config, name))
    return None if pattern_problems else config, (*problems, *pattern_problems)


def _given(document: Mapping[str, Any]) -> Iterator[str]:
    """The settings that count. Older versions of peft write null for those that have their default."""
    for key, value in document.items():
        if key in AdapterConfig.model_fields and (value is not None or AdapterConfig.model_fields[key].is_required()):
            yield key


def load_json_object(raw: bytes, *, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a bounded file. Raises ArtifactError."""
    if len(raw) > max_bytes:
        raise refusal("config-too-long", file=name, bound=max_bytes)
    try:
        document = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise refusal("config-not-json", file=name, wanted="valid JSON") from error
    if not isinstance(document, dict):
        raise refusal("config-not-json", file=name, wanted="a JSON object")
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
                raise refusal("code", file=name)
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _kind_problems(document: Mapping[str, Any], name: str) -> Iterator[ArtifactError]:
    """Why the file does not describe a LoRA adapter that generates text."""
    kind, task = document.get("peft_type"), document.get("task_type")
    if kind is None and (found := MLX.intersection(document)):
        yield refusal("mlx-config", file=name, setting=min(found))
    elif kind != LORA:
        known = KINDS.get(kind) if isinstance(kind, str) else None
        why = f", which {known.why}" if known else ""
        remedy = _sentence(known.remedy if known else "train with peft's LoraConfig")
        yield refusal("other-kind", file=name, kind=_short(kind), why=why, remedy=remedy)
    elif task not in GENERATES:
        yield refusal("classifier", file=name, task=_short(task))


def _setting_problems(document: Mapping[str, Any], name: str) -> Iterator[ArtifactError]:
    """The settings that the tables refuse."""
    if document.get("peft_type") != LORA:
        return
    yield from _initialization_problems(document.get("init_lora_weights", True), name)
    if document.get("bias", "none") != "none":
        yield refusal("trained-bias", file=name, value=_short(document["bias"]))
    for key, value in document.items():
        if key in AdapterConfig.model_fields or key in HARMLESS or not _is_on(value):
            continue
        if known := REFUSED.get(key):
            yield refusal("setting", file=name, setting=key, why=known.why, remedy=_sentence(known.remedy))
        elif key not in ("bias", "init_lora_weights"):
            yield refusal("unknown-setting", file=name, setting=_short(key))


def _value_problems(error: ValidationError, name: str) -> Iterator[ArtifactError]:
    for each in error.errors(include_url=False):
        if each["loc"] == ("lora_alpha",) and each["input"] == 0:
            yield refusal("no-scale", file=name, value=0)
        else:
            setting = ".".join(str(part) for part in each["loc"])[:100]
            yield refusal("bad-value", file=name, setting=setting, what=each["msg"])


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, "", [], {})


def _initialization_problems(value: Any, name: str) -> Iterator[ArtifactError]:
    """Refuses initializations that change the base's weights: such an adapter is wrong on the original base."""
    if isinstance(value, bool) or value is None:
        return
    method = value.lower() if isinstance(value, str) else ""
    if method in INITIALIZATIONS:
        return
    known = REFUSED_INITIALIZATIONS.get("pissa" if method.startswith("pissa_niter_") else method)
    why = known.why if known else "is unknown"
    remedy = _sentence(known.remedy if known else "train it again with init_lora_weights=True")
    yield refusal("initialization", file=name, value=_short(value), why=why, remedy=remedy)


def _pattern_problems(config: AdapterConfig, name: str) -> Iterator[ArtifactError]:
    for field, expression in (("target_modules", config.target_modules), ("exclude_modules", config.exclude_modules)):
        if isinstance(expression, str) and (what := _bad_expression(expression)):
            yield refusal("bad-expression", file=name, setting=field, value=_short(expression), what=what)
    for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for key, value in patterns.items():
            if not 0 < value < 1e6:
                what = f"{_short(key)} has {value}, which must be positive"
                yield refusal("bad-value", file=name, setting=field, what=what)
        try:
            PerModule(patterns)
        except PatternError as error:
            yield refusal("expression", file=name, setting=field, what=error)
    given = config.layers_pattern or []
    for key in [given] if isinstance(given, str) else given:
        if not _LAYERS_PATTERN.match(key):
            yield refusal("expression", file=name, setting="layers_pattern", what=_short(key))
    if not (config.target_modules or config.target_parameters):
        yield refusal("no-targets", file=name)


def _bad_expression(expression: str) -> str:
    """Why Python, and so peft, cannot compile an expression; empty if it can, or if it is too long to be tried."""
    try:
        re.compile(expression if len(expression) <= MAX_CHARS else "")
    except (re.error, OverflowError, RecursionError) as error:
        return str(error) or type(error).__name__
    return ""


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:79] + "…"


def suffixes(modules: Iterable[str]) -> tuple[str, ...]:
    """Last parts of module names, sorted and without duplicates, as shown in `status.targetModules`."""
    return tuple(sorted({module.rpartition(".")[2] for module in modules}))
