"""Does this adapter fit this base? Decided from headers and settings, before anything is loaded.

Called by `inspect`, so by the operator for every adapter and by the runtime after a fetch, and by the runtime's
`adapter_file` with the layers of the loaded base. Pure. Shapes decide; names only explain. Every tensor must be
used and every targeted module must have its pair: what half applies answers almost like the base, unseen.

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
from lorapool_artifacts.settings import JudgeLimits

MAX_WORDS = 3
"""Mismatches told in words; the rest is counted."""

_BESIDE = 8

PREFIX = "base_model.model."
_PAIR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])\.weight$")
_LAYER = re.compile(r"\.(\d{1,6})\.")
_NOT_LINEAR = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in"})
_HEADS = frozenset({"lm_head", "embed_out"})
_EXPERT = re.compile(r"^(?P<mixture>.+)\.experts(?:\.|$)")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What a base is, as far as adapters are concerned."""

    modules: Mapping[str, tuple[int, int]]
    """Full name of each linear module → (out features, in features)."""
    names: frozenset[str] = frozenset()
    """Names it goes by (repository, `_name_or_path`, served name), for explanations only."""
    architectures: tuple[str, ...] = ()
    loaded: bool = False
    """`modules` are the layers of the loaded base that adapters can change, no more and no fewer. Otherwise they are
    all matrices of its files: with embeddings, and with experts under names that loading does away with."""

    def with_names(self, *names: str) -> BaseFacts:
        return replace(self, names=self.names | {name for name in names if name})


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What an adapter says it is."""

    config: AdapterConfig
    shapes: Mapping[str, Shape]
    """Of its tensors, by their full names in the file."""
    size_bytes: int
    """Of all its files."""


@dataclass(frozen=True, slots=True)
class Verdict:
    ok: bool
    reason: FailureReason | None
    """None when ok."""
    message: str
    """For the owner; names the remedy when not ok, may hold a hint when ok."""
    rank: int
    """The largest of its modules."""
    target_modules: tuple[str, ...]
    """Last parts of the names of the modules it changes, sorted."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Tensors sorted by the module they belong to."""

    parts: Mapping[str, Mapping[str, Shape]]
    """Module → {"A": shape, "B": shape}, perhaps incomplete."""
    extra: tuple[str, ...]

    @property
    def rank(self) -> int:
        return max((part["A"][0] for part in self.parts.values() if part.get("A")), default=0)


@dataclass(frozen=True, slots=True)
class _Finding:
    reason: FailureReason
    lines: tuple[str, ...]
    remedy: str


def judge(adapter: AdapterFacts, base: BaseFacts | None, limits: JudgeLimits) -> Verdict:
    """The verdict; without a base only what the adapter alone can tell is judged."""
    pairs = _sort(adapter.shapes)
    finding = _first_finding(adapter, pairs, base, limits)
    rank = max(pairs.rank, 0 if pairs.rank else adapter.config.r)
    targets = suffixes(pairs.parts)
    hint = _name_hint(adapter.config, base)
    if finding is None:
        message = f"rank {rank} on {', '.join(targets)}"
        return Verdict(True, None, f"{message}; {hint}" if hint else message, rank, targets, adapter.size_bytes)
    told = "; ".join(finding.lines[:MAX_WORDS])
    more = f"; and {len(finding.lines) - MAX_WORDS} more" if len(finding.lines) > MAX_WORDS else ""
    explained = f" ({hint})" if hint and finding.reason is FailureReason.WRONG_BASE else ""
    return Verdict(
        False, finding.reason, f"{told}{more}{explained}. {finding.remedy}", rank, targets, adapter.size_bytes
    )


def _first_finding(
    adapter: AdapterFacts, pairs: _Pairs, base: BaseFacts | None, limits: JudgeLimits
) -> _Finding | None:
    """The most telling thing wrong: bounds, then the files themselves, then the fit to the base."""
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
    """Tensor name → (module, "A" or "B"); None for what is no LoRA matrix."""
    match = _PAIR.match(name)
    return (match["module"], match["part"]) if match else None


def _sort(shapes: Mapping[str, Shape]) -> _Pairs:
    parts: dict[str, dict[str, Shape]] = {}
    extra = []
    for name, shape in shapes.items():
        if pair := pair_of(name):
            parts.setdefault(pair[0], {})[pair[1]] = shape
        elif name.rpartition(".")[2] not in HARMLESS_TENSORS:
            extra.append(name)
    return _Pairs(parts, tuple(sorted(extra)))


def _too_large(adapter: AdapterFacts, limits: JudgeLimits) -> _Finding | None:
    if adapter.size_bytes <= limits.max_bytes:
        return None
    line = f"the adapter is {adapter.size_bytes} bytes, more than the {limits.max_bytes} allowed"
    return _Finding(
        FailureReason.TOO_LARGE, (line,), "Save it in bf16, or train with a smaller rank or fewer target modules."
    )


def _extra_tensors(pairs: _Pairs) -> _Finding | None:
    if not pairs.extra:
        return None
    lines = tuple(f"tensor {_show(name)} {_what_is(name)}" for name in pairs.extra)
    return _Finding(
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
    return "is no part of a LoRA adapter"


def _broken_pairs(config: AdapterConfig, pairs: _Pairs) -> _Finding | None:
    lines = []
    for module, part in sorted(pairs.parts.items()):
        a, b, rank = part.get("A"), part.get("B"), config.rank_of(module)
        if a is None or b is None:
            lines.append(f"{_show(module)} has no lora_{'A' if a is None else 'B'} weight")
        elif len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
            lines.append(f"{_show(module)} has lora_A {list(a)} and lora_B {list(b)}, which are no full matrices")
        elif a[0] != b[1]:
            lines.append(f"{_show(module)} has rank {a[0]} in lora_A {list(a)} but {b[1]} in lora_B {list(b)}")
        elif a[0] != rank:
            lines.append(f"{_show(module)} has rank {a[0]} but adapter_config.json says {rank}")
    if not lines:
        return None
    return _Finding(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained().",
    )


def _rank(pairs: _Pairs, limits: JudgeLimits) -> _Finding | None:
    if pairs.rank <= limits.max_rank:
        return None
    line = f"the adapter's rank is {pairs.rank}, the base allows {limits.max_rank}"
    return _Finding(
        FailureReason.RANK_TOO_HIGH,
        (line,),
        f"Train with r <= {limits.max_rank}, or raise spec.lora.maxRank of the BaseModel.",
    )


def _unsupported_modules(pairs: _Pairs, base: BaseFacts | None) -> _Finding | None:
    """What no base lets adapters change, whether it has it or not."""
    known = base.modules if base is not None and base.loaded else ()
    lines = [
        f"{_show(module)} is {what}"
        for module in sorted(pairs.parts)
        if module not in known and (what := _what_no_adapter_changes(module))
    ]
    if not lines:
        return None
    return _Finding(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Only linear layers inside the model can be adapted; train without these modules.",
    )


def _what_no_adapter_changes(module: str) -> str | None:
    last = module.rpartition(".")[2]
    if last in _HEADS:
        return "the output head"
    if last in _NOT_LINEAR:
        return "an embedding"
    return "an expert of a mixture" if _EXPERT.match(module) else None


def _unlike_base(config: AdapterConfig, pairs: _Pairs, base: BaseFacts) -> _Finding | None:
    """Modules the base does not have, or has in another shape."""
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
    # the sentence about what is there is told once: it is the same for all layers
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
        return _Finding(
            FailureReason.WRONG_BASE,
            tuple(shaped + lines),
            f"Point baseModelRef at the model the adapter was trained on{trained_on}.",
        )
    return _Finding(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        f"Train it on this base, naming modules that it has{trained_on}.",
    )


def _instead(module: str, base: BaseFacts) -> str:
    """What the base has where the adapter looks for a module of its own."""
    parent, _, _ = module.rpartition(".")
    beside = sorted(other.rpartition(".")[2] for other in base.modules if other.rpartition(".")[0] == parent)
    if beside:
        return f", only {', '.join(beside[:_BESIDE])}{' and others' if len(beside) > _BESIDE else ''} there"
    layers = [int(found[1]) for other in base.modules if (found := _LAYER.search(other))]
    layer = _LAYER.search(module)
    if layers and layer and int(layer[1]) > max(layers):
        return f", its last layer is {max(layers)}"
    return ""


def _deeper(unknown: Iterable[str], base: BaseFacts) -> bool:
    """Whether the unknown modules only lie in layers that the base does not have."""
    known = {_LAYER.sub(".#.", module) for module in base.modules}
    return all(_LAYER.sub(".#.", module) in known for module in unknown)


def _against_settings(config: AdapterConfig, pairs: _Pairs, base: BaseFacts | None) -> _Finding | None:
    """Tensors and settings must name the same modules."""
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
    return _Finding(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained().",
    )


def _missing(config: AdapterConfig, pairs: _Pairs, base: BaseFacts | None) -> list[str]:
    if base is None:
        return []
    linear: Iterable[str] = base.modules
    if not base.loaded:
        # which matrices of a mixture are linear layers after loading, only the loaded model can tell
        mixtures = tuple({f"{found['mixture']}." for module in base.modules if (found := _EXPERT.match(module))})
        linear = (m for m in linear if m.rpartition(".")[2] not in _NOT_LINEAR | _HEADS and not _within(m, mixtures))
    return sorted(module for module in linear if module not in pairs.parts and config.targets(module))


def _within(module: str, mixtures: tuple[str, ...]) -> bool:
    return bool(mixtures) and module.startswith(mixtures)


def _name_hint(config: AdapterConfig, base: BaseFacts | None) -> str:
    """Says when the adapter names another base than this one; never decides."""
    told = config.base_model_name_or_path
    if base is None or not told or not base.names:
        return ""
    if _plain(told) in {_plain(name) for name in base.names}:
        return ""
    return f"it names {_show(told)} as its base, here it runs on {_show(min(base.names))}"


def _plain(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _show(text: str) -> str:
    return ascii(text if len(text) <= 120 else text[:119] + "…").strip("'")
