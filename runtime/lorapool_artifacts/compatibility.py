"""Checks whether an adapter fits a base, from headers and settings, before anything is loaded.

Pure. Shapes decide; names are used in messages only. Every tensor must be used and every targeted module must have
its pair of matrices: an adapter that applies only in part would answer almost like the base, unnoticed.

    adapter tensor                                     base tensor
    base_model.model.<module>.lora_A.weight [r, in]    <module>.weight [out, in]
    base_model.model.<module>.lora_B.weight [out, r]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import AdapterConfig, suffixes
from lorapool_artifacts.causes import CAUSES
from lorapool_artifacts.peft_settings import HARMLESS_TENSORS, TENSORS
from lorapool_artifacts.settings import AdapterLimits
from lorapool_artifacts.tensor_names import pair_of, without_wrappers

MAX_MISMATCHES = 3
"""Mismatches described in a message; the others are counted."""

_MAX_SIBLINGS = 8
"""Names of existing modules listed in a message."""

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
class Finding:
    """One cause for which an adapter is refused."""

    reason: FailureReason
    message: str
    """What was found and the remedy."""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Tensors grouped by module."""

    parts: Mapping[str, Mapping[str, Shape]]
    """Module → {"A": shape, "B": shape}; either may be missing."""
    extra: tuple[str, ...]
    """Names of tensors that belong to no pair, sorted."""
    repeated: tuple[str, ...]
    """Names of tensors that stand for the same matrix as another one."""

    @property
    def rank(self) -> int:
        return max((part["A"][0] for part in self.parts.values() if part.get("A")), default=0)

    def whole(self) -> Iterator[tuple[str, Shape, Shape]]:
        """The modules that have both matrices, with the shapes of A and B, sorted."""
        for module, part in sorted(self.parts.items()):
            a, b = part.get("A", ()), part.get("B", ())
            if len(a) == len(b) == 2:
                yield module, a, b


@dataclass(frozen=True, slots=True)
class _Mismatch:
    """Why the adapter does not fit: one line per mismatch, and one remedy for all."""

    cause: str
    """A key of CAUSES."""
    lines: tuple[str, ...]
    fields: Mapping[str, object] = field(default_factory=dict)
    """For the remedy."""

    @property
    def reason(self) -> FailureReason:
        return CAUSES[self.cause].reason

    def message(self, hint: str) -> str:
        described = "; ".join(self.lines[:MAX_MISMATCHES])
        more = f"; and {len(self.lines) - MAX_MISMATCHES} more" if len(self.lines) > MAX_MISMATCHES else ""
        explained = f" ({hint})" if hint and self.reason is FailureReason.WRONG_BASE else ""
        return f"{described}{more}{explained}. {CAUSES[self.cause].remedy.format(**self.fields)}"


def _mismatch(cause: str, found: Iterable[Mapping[str, object]], **fields: object) -> Iterator[_Mismatch]:
    """The mismatch with a line for each of `found`, which fill the cause's sentence; none if there are none."""
    if lines := tuple(CAUSES[cause].sentence.format(**each) for each in found):
        yield _Mismatch(cause, lines, fields)


def check_compatibility(adapter: AdapterFacts, base: BaseFacts | None, limits: AdapterLimits) -> CompatibilityResult:
    """Whether the adapter fits the base, and the first cause if not. Without a base, only the adapter is checked."""
    pairs = _pairs(adapter.shapes)
    mismatch = next(_mismatches(adapter, pairs, base, limits), None)
    rank = max(pairs.rank, 0 if pairs.rank else adapter.config.r)
    targets = suffixes(pairs.parts)
    hint = _name_hint(adapter.config, base)
    if mismatch is None:
        message = f"rank {rank} on {', '.join(targets)}"
        return CompatibilityResult(
            True, None, f"{message}; {hint}" if hint else message, rank, targets, adapter.size_bytes
        )
    return CompatibilityResult(False, mismatch.reason, mismatch.message(hint), rank, targets, adapter.size_bytes)


def all_findings(adapter: AdapterFacts, base: BaseFacts | None, limits: AdapterLimits) -> tuple[Finding, ...]:
    """Every cause for which the adapter would be refused."""
    hint = _name_hint(adapter.config, base)
    found = _mismatches(adapter, _pairs(adapter.shapes), base, limits)
    return tuple(Finding(mismatch.reason, mismatch.message(hint)) for mismatch in found)


def _mismatches(
    adapter: AdapterFacts, pairs: _Pairs, base: BaseFacts | None, limits: AdapterLimits
) -> Iterator[_Mismatch]:
    """The kinds of mismatch, in the order: bounds, the files themselves, the fit to the base."""
    yield from _too_large(adapter, limits)
    yield from _mismatch("empty-tensors", _empty_tensors(adapter.shapes))
    yield from _extra_tensors(pairs)
    yield from _mismatch("several-adapters", ({"tensor": _show(name)} for name in pairs.repeated))
    yield from _broken_pairs(adapter.config, pairs)
    yield from _rank(pairs, limits)
    yield from _unsupported_modules(pairs, base)
    misfits = _unlike_base(adapter.config, pairs, base) if base is not None else ()
    yield from misfits
    if not misfits:
        yield from _against_settings(adapter.config, pairs, base)


def _pairs(shapes: Mapping[str, Shape]) -> _Pairs:
    parts: dict[str, dict[str, Shape]] = {}
    extra, repeated = [], []
    for name, shape in shapes.items():
        if pair := pair_of(name):
            part = parts.setdefault(pair[0], {})
            if pair[1] in part:
                repeated.append(name)
            part[pair[1]] = shape
        elif name.rpartition(".")[2] not in HARMLESS_TENSORS:
            extra.append(name)
    return _Pairs(parts, tuple(sorted(extra)), tuple(sorted(repeated)))


def _too_large(adapter: AdapterFacts, limits: AdapterLimits) -> Iterator[_Mismatch]:
    if adapter.size_bytes > limits.max_bytes:
        yield from _mismatch("too-large", [{"size": adapter.size_bytes, "bound": limits.max_bytes}])


def _empty_tensors(shapes: Mapping[str, Shape]) -> Iterator[Mapping[str, object]]:
    return ({"tensor": _show(name), "shape": list(shape)} for name, shape in shapes.items() if 0 in shape)


def _extra_tensors(pairs: _Pairs) -> Iterator[_Mismatch]:
    by_cause = sorted((_cause_of(name), name) for name in pairs.extra)
    for cause, group in itertools.groupby(by_cause, key=lambda pair: pair[0]):
        yield from _mismatch(cause, ({"tensor": _show(name)} for _, name in group))


def _cause_of(name: str) -> str:
    """The cause for which a tensor that is not a LoRA matrix is refused."""
    plain = without_wrappers(name)
    return next((cause for expression, cause in TENSORS if re.search(expression, plain)), "surplus-tensor")


def _broken_pairs(config: AdapterConfig, pairs: _Pairs) -> Iterator[_Mismatch]:
    found: dict[str, list[Mapping[str, object]]] = {}
    for module, part in sorted(pairs.parts.items()):
        if cause := _broken(config.rank_of(module), part.get("A"), part.get("B")):
            found.setdefault(cause[0], []).append({"module": _show(module), **cause[1]})
    for cause_name, modules in found.items():
        yield from _mismatch(cause_name, modules)


def _broken(rank: int, a: Shape | None, b: Shape | None) -> tuple[str, Mapping[str, object]] | None:
    """The cause for which a module's matrices are refused, and the fields of its sentence."""
    if a is None or b is None:
        return "half-a-pair", {"part": f"lora_{'A' if a is None else 'B'}"}
    if 0 in a or 0 in b:
        return None  # an empty tensor has a cause of its own
    if len(a) != 2 or len(b) != 2:
        return "not-matrices", {"a": list(a), "b": list(b)}
    if a[0] != b[1]:
        return "unequal-ranks", {"rank": a[0], "a": list(a), "other": b[1], "b": list(b)}
    return ("other-rank", {"rank": a[0], "other": rank}) if a[0] != rank else None


def _rank(pairs: _Pairs, limits: AdapterLimits) -> Iterator[_Mismatch]:
    if pairs.rank > limits.max_rank:
        found = {"rank": pairs.rank, "bound": limits.max_rank}
        yield from _mismatch("rank-too-high", [found], **found)


def _unsupported_modules(pairs: _Pairs, base: BaseFacts | None) -> Iterator[_Mismatch]:
    """Modules that adapters can change in no base, whether this base has them or not."""
    known = base.modules if base is not None and base.loaded else ()
    found: dict[str, list[str]] = {}
    for module in sorted(pairs.parts):
        if module not in known and (cause := _unsupported_kind(module)):
            found.setdefault(cause, []).append(module)
    for cause, modules in found.items():
        lines = ({"module": _show(module)} for module in modules)
        yield from _mismatch(cause, lines, names=", ".join(suffixes(modules)))


def _unsupported_kind(module: str) -> str | None:
    last = module.rpartition(".")[2]
    if last in _HEADS:
        return "head"
    if last in _NOT_LINEAR:
        return "embedding"
    return "experts" if _EXPERT.match(module) else None


def _unlike_base(config: AdapterConfig, pairs: _Pairs, base: BaseFacts) -> tuple[_Mismatch, ...]:
    """Modules that the base lacks or has in another shape."""
    unknown, shaped, count = [], [], 0
    for module, a, b in pairs.whole():
        count += 1
        if module not in base.modules:
            unknown.append(module)
        elif base.modules[module] != (b[0], a[1]):
            out_features, in_features = base.modules[module]
            shaped.append(
                f"{_show(module)} is {out_features}x{in_features} in the base but the adapter fits {b[0]}x{a[1]}"
            )
    if not unknown and not shaped:
        return ()
    what = "linear layer" if base.loaded else "module"
    # The existing modules are listed for the first layer only: the list is the same for all layers.
    lines = [
        f"the base has no {what} {_show(module)}{'' if number else _instead(module, base)}"
        for number, module in enumerate(unknown)
    ]
    named = config.base_model_name_or_path
    trained_on = f"; the adapter says it was trained on {_show(named)}" if named else ""
    other_base = bool(shaped) or len(unknown) == count or _deeper(unknown, base)
    cause = "wrong-base" if other_base else "unknown-modules"
    return tuple(_mismatch(cause, ({"what": line} for line in shaped + lines), trained_on=trained_on))


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


def _against_settings(config: AdapterConfig, pairs: _Pairs, base: BaseFacts | None) -> Iterator[_Mismatch]:
    """Modules that only the tensors or only the settings name."""
    surplus = (module for module in sorted(pairs.parts) if config.targets(module) is False)
    yield from _mismatch("untargeted", ({"module": _show(module)} for module in surplus))
    missing = _missing(config, pairs, base)
    yield from _mismatch("without-weights", ({"module": _show(module)} for module in missing))
    if not pairs.parts:
        yield from _mismatch("changes-nothing", [{}])


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
