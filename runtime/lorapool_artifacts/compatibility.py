"""Checks whether an adapter fits a base, from headers and settings, before anything is loaded.

Pure. Shapes decide; names are used in messages only. Every tensor must be used and every targeted module must have
its pair of matrices: an adapter that applies only in part would answer almost like the base, unnoticed.

    adapter tensor                                     base tensor
    base_model.model.<module>.lora_A.weight [r, in]    <module>.weight [out, in]
    base_model.model.<module>.lora_B.weight [out, r]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import AdapterConfig, suffixes
from lorapool_artifacts.peft_settings import HARMLESS_TENSORS, TENSORS
from lorapool_artifacts.settings import AdapterLimits

MAX_MISMATCHES = 3
"""Mismatches described in a message; the others are counted."""

_MAX_SIBLINGS = 8
"""Names of existing modules listed in a message."""

PREFIX = "base_model.model."
_PAIR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_LAYER = re.compile(r"\.(\d{1,6})\.")
_NOT_LINEAR = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in"})
_HEADS = frozenset({"lm_head", "embed_out"})
_EXPERT = re.compile(r"^(?P<mixture>.+)\.experts(?:\.|$)")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The properties of a base that adapters depend on."""

    modules: Mapping[str, tuple[int, int]]
    """Full name of each linear module → (out features, in features)."""
    names: frozenset[str] = frozenset()
    """Known names of the base (repository, `_name_or_path`, served name), for messages only."""
    architectures: tuple[str, ...] = ()
    """The architectures listed in config.json."""
    loaded: bool = False
    """True: `modules` are exactly the layers of the loaded base that adapters can change. False: they are all
    matrices of its files, including embeddings, and experts under names that disappear when the base is loaded."""

    def with_names(self, *names: str) -> BaseFacts:
        """The same facts with more names; empty ones are ignored."""
        return replace(self, names=self.names | {name for name in names if name})


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """The properties of an adapter that its files declare."""

    config: AdapterConfig
    shapes: Mapping[str, Shape]
    """Full name of each tensor in the file → its shape."""
    size_bytes: int
    """Size of all its files together."""


@dataclass(frozen=True, slots=True)
class CompatibilityResult:
    """Whether an adapter fits, and its properties."""

    ok: bool
    reason: FailureReason | None
    """None when ok."""
    message: str
    """For the owner: the remedy when not ok, otherwise a summary."""
    rank: int
    """The largest rank of its modules."""
    target_modules: tuple[str, ...]
    """Last parts of the names of the modules it changes, sorted."""
    size_bytes: int
    """Size of all its files together."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Tensors grouped by module."""

    parts: Mapping[str, Mapping[str, Shape]]
    """Module → {"A": shape, "B": shape}; either may be missing."""
    extra: tuple[str, ...]
    """Names of tensors that belong to no pair, sorted."""

    @property
    def rank(self) -> int:
        return max((part["A"][0] for part in self.parts.values() if part.get("A")), default=0)


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """Why the adapter does not fit: one line per mismatch, and one remedy for all."""

    reason: FailureReason
    lines: tuple[str, ...]
    remedy: str


def check_compatibility(adapter: AdapterFacts, base: BaseFacts | None, limits: AdapterLimits) -> CompatibilityResult:
    """Whether the adapter fits the base. Without a base, only the adapter itself is checked."""
    pairs = _pairs(adapter.shapes)
    mismatch = _first_mismatch(adapter, pairs, base, limits)
    rank = max(pairs.rank, 0 if pairs.rank else adapter.config.r)
    targets = suffixes(pairs.parts)
    hint = _name_hint(adapter.config, base)
    if mismatch is None:
        message = f"rank {rank} on {', '.join(targets)}"
        return CompatibilityResult(
            True, None, f"{message}; {hint}" if hint else message, rank, targets, adapter.size_bytes
        )
    described = "; ".join(mismatch.lines[:MAX_MISMATCHES])
    more = f"; and {len(mismatch.lines) - MAX_MISMATCHES} more" if len(mismatch.lines) > MAX_MISMATCHES else ""
    explained = f" ({hint})" if hint and mismatch.reason is FailureReason.WRONG_BASE else ""
    return CompatibilityResult(
        False, mismatch.reason, f"{described}{more}{explained}. {mismatch.remedy}", rank, targets, adapter.size_bytes
    )


def _first_mismatch(
    adapter: AdapterFacts, pairs: _Pairs, base: BaseFacts | None, limits: AdapterLimits
) -> _Mismatch | None:
    """The first kind of mismatch, in the order: bounds, the files themselves, the fit to the base."""
    return (
        _too_large(adapter, limits)
        or _extra_tensors(pairs)
        or _broken_pairs(adapter.config, pairs)
        or _rank(pairs, limits)
        or _unsupported_modules(pairs, base)
        or (_unlike_base(adapter.config, pairs, base) if base is not None else None)
        or _against_settings(adapter.config, pairs, base)
    )


def pair_of(name: str) -> tuple[str, str] | None:
    """Tensor name → (module, "A" or "B"); None for any tensor that is not a LoRA matrix."""
    match = _PAIR.match(name)
    return (match["module"], match["part"]) if match else None


def _pairs(shapes: Mapping[str, Shape]) -> _Pairs:
    parts: dict[str, dict[str, Shape]] = {}
    extra = []
    for name, shape in shapes.items():
        if pair := pair_of(name):
            parts.setdefault(pair[0], {})[pair[1]] = shape
        elif name.rpartition(".")[2] not in HARMLESS_TENSORS:
            extra.append(name)
    return _Pairs(parts, tuple(sorted(extra)))


def _too_large(adapter: AdapterFacts, limits: AdapterLimits) -> _Mismatch | None:
    if adapter.size_bytes <= limits.max_bytes:
        return None
    line = f"the adapter is {adapter.size_bytes} bytes, more than the {limits.max_bytes} allowed"
    return _Mismatch(
        FailureReason.TOO_LARGE, (line,), "Save it in bf16, or train with a smaller rank or fewer target modules."
    )


def _extra_tensors(pairs: _Pairs) -> _Mismatch | None:
    if not pairs.extra:
        return None
    lines = tuple(f"tensor {_show(name)} {_what_is(name)}" for name in pairs.extra)
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        lines,
        "Every tensor must be a lora_A or lora_B weight as peft saves it; train without these extras.",
    )


def _what_is(name: str) -> str:
    for part, sentence in TENSORS:
        if part in name:
            return sentence
    if name.endswith(".bias"):
        return "is a bias, which is not supported"
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", name):
        return "carries an adapter name, so it was not written by save_pretrained()"
    return "is not part of a LoRA adapter"


def _broken_pairs(config: AdapterConfig, pairs: _Pairs) -> _Mismatch | None:
    lines = []
    for module, part in sorted(pairs.parts.items()):
        a, b, rank = part.get("A"), part.get("B"), config.rank_of(module)
        if a is None or b is None:
            lines.append(f"{_show(module)} has no lora_{'A' if a is None else 'B'} weight")
        elif len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
            lines.append(
                f"{_show(module)} has lora_A {list(a)} and lora_B {list(b)}, which are not two-dimensional matrices"
            )
        elif a[0] != b[1]:
            lines.append(f"{_show(module)} has rank {a[0]} in lora_A {list(a)} but {b[1]} in lora_B {list(b)}")
        elif a[0] != rank:
            lines.append(f"{_show(module)} has rank {a[0]} but adapter_config.json says {rank}")
    if not lines:
        return None
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained().",
    )


def _rank(pairs: _Pairs, limits: AdapterLimits) -> _Mismatch | None:
    if pairs.rank <= limits.max_rank:
        return None
    line = f"the adapter's rank is {pairs.rank}, the base allows {limits.max_rank}"
    return _Mismatch(
        FailureReason.RANK_TOO_HIGH,
        (line,),
        f"Train with r <= {limits.max_rank}, or raise spec.lora.maxRank of the BaseModel.",
    )


def _unsupported_modules(pairs: _Pairs, base: BaseFacts | None) -> _Mismatch | None:
    """Modules that adapters can change in no base, whether this base has them or not."""
    known = base.modules if base is not None and base.loaded else ()
    lines = [
        f"{_show(module)} is {what}"
        for module in sorted(pairs.parts)
        if module not in known and (what := _unsupported_kind(module))
    ]
    if not lines:
        return None
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Only linear layers inside the model can be adapted; train without these modules.",
    )


def _unsupported_kind(module: str) -> str | None:
    last = module.rpartition(".")[2]
    if last in _HEADS:
        return "the output head"
    if last in _NOT_LINEAR:
        return "an embedding"
    return "an expert of a mixture" if _EXPERT.match(module) else None


def _unlike_base(config: AdapterConfig, pairs: _Pairs, base: BaseFacts) -> _Mismatch | None:
    """Modules that the base lacks or has in another shape."""
    unknown = [module for module in sorted(pairs.parts) if module not in base.modules]
    shaped = []
    for module, part in sorted(pairs.parts.items()):
        if module in base.modules:
            (out_features, in_features), a, b = base.modules[module], part["A"], part["B"]
            if a[1] != in_features or b[0] != out_features:
                shaped.append(
                    f"{_show(module)} is {out_features}x{in_features} in the base but the adapter fits {b[0]}x{a[1]}"
                )
    if not unknown and not shaped:
        return None
    what = "linear layer" if base.loaded else "module"
    # The existing modules are listed for the first layer only: the list is the same for all layers.
    lines = [
        f"the base has no {what} {_show(module)}{'' if number else _instead(module, base)}"
        for number, module in enumerate(unknown)
    ]
    trained_on = (
        f"; the adapter says it was trained on {_show(config.base_model_name_or_path)}"
        if config.base_model_name_or_path
        else ""
    )
    if shaped or len(unknown) == len(pairs.parts) or _deeper(unknown, base):
        return _Mismatch(
            FailureReason.WRONG_BASE,
            tuple(shaped + lines),
            f"Point baseModelRef at the model the adapter was trained on{trained_on}.",
        )
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        f"Train it on this base, naming modules that it has{trained_on}.",
    )


def _instead(module: str, base: BaseFacts) -> str:
    """The modules that the base has in that place, as the end of a sentence; empty when there are none."""
    parent, _, _ = module.rpartition(".")
    siblings = sorted(other.rpartition(".")[2] for other in base.modules if other.rpartition(".")[0] == parent)
    if siblings:
        others = " and others" if len(siblings) > _MAX_SIBLINGS else ""
        return f", only {', '.join(siblings[:_MAX_SIBLINGS])}{others} there"
    layers = [int(found[1]) for other in base.modules if (found := _LAYER.search(other))]
    layer = _LAYER.search(module)
    if layers and layer and int(layer[1]) > max(layers):
        return f", its last layer is {max(layers)}"
    return ""


def _deeper(unknown: Iterable[str], base: BaseFacts) -> bool:
    """Whether the unknown modules all belong to layers beyond the base's last one."""
    known = {_LAYER.sub(".#.", module) for module in base.modules}
    return all(_LAYER.sub(".#.", module) in known for module in unknown)


def _against_settings(config: AdapterConfig, pairs: _Pairs, base: BaseFacts | None) -> _Mismatch | None:
    """Modules that only the tensors or only the settings name."""
    lines = [
        f"{_show(module)} has weights but is not in target_modules"
        for module in sorted(pairs.parts)
        if config.targets(module) is False
    ]
    lines += [f"{_show(module)} is targeted but has no weights" for module in _missing(config, pairs, base)]
    if not pairs.parts:
        lines.append("no module of the base is changed")
    if not lines:
        return None
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained().",
    )


def _missing(config: AdapterConfig, pairs: _Pairs, base: BaseFacts | None) -> list[str]:
    if base is None:
        return []
    linear: Iterable[str] = base.modules
    if not base.loaded:
        # Which matrices of a mixture of experts become linear layers is only known once the model is loaded.
        mixtures = tuple({f"{found['mixture']}." for module in base.modules if (found := _EXPERT.match(module))})
        linear = (m for m in linear if m.rpartition(".")[2] not in _NOT_LINEAR | _HEADS and not _within(m, mixtures))
    return sorted(module for module in linear if module not in pairs.parts and config.targets(module))


def _within(module: str, mixtures: tuple[str, ...]) -> bool:
    return bool(mixtures) and module.startswith(mixtures)


def _name_hint(config: AdapterConfig, base: BaseFacts | None) -> str:
    """A note for the message when the adapter names another base; it never decides."""
    named = config.base_model_name_or_path
    if base is None or not named or not base.names:
        return ""
    if _plain(named) in {_plain(name) for name in base.names}:
        return ""
    return f"it names {_show(named)} as its base, here it runs on {_show(min(base.names))}"


def _plain(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _show(text: str) -> str:
    return ascii(text if len(text) <= 120 else text[:119] + "…").strip("'")
