"""Checks whether an adapter fits a base, from headers and settings, before anything is loaded.

Pure. Shapes decide; names are used in messages only. Every tensor must be used and every targeted module must have
its pair of matrices: an adapter that applies only in part would answer almost like the base, unnoticed. Two things
have no effect and are left out: copies of the base's embeddings whose rows are the base's own, which only a runtime
can compare, and matrices of modules that no text passes.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lorapool_api.base_modules import ModuleKind
from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.adapter_config import AdapterConfig, suffixes
from lorapool_artifacts.checks.adapter_tensors import (
    AdapterTensors,
    Pair,
    Shape,
    fits,
    kind_by_name,
    shapes_of,
    sort_tensors,
)
from lorapool_artifacts.checks.base_facts import BaseFacts, is_parameter
from lorapool_artifacts.checks.causes import CAUSES
from lorapool_artifacts.checks.peft_settings import TENSORS
from lorapool_artifacts.checks.tensor_names import without_wrappers
from lorapool_artifacts.settings import AdapterLimits

MAX_MISMATCHES = 3
"""Mismatches described in a message; the others are counted."""

_MAX_SIBLINGS = 8
"""Names of existing modules listed in a message."""

_LAYER = re.compile(r"\.(\d{1,6})\.")


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


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter with its tensors sorted."""

    config: AdapterConfig
    shapes: Mapping[str, Shape]
    tensors: AdapterTensors

    def of(self, pair: Pair) -> tuple[Shape | None, Shape | None]:
        """The shapes of A and B."""
        return shapes_of(pair, self.shapes)

    def expected_rank(self, pair: Pair) -> int | None:
        """Rows of A by the settings; None where only the base tells how many experts they are for."""
        if pair.place is None and self.config.target_parameters:
            return None
        return self.config.rank_of(pair.setting) * pair.experts

    @property
    def rank(self) -> int:
        """The largest rank of one matrix."""
        return max((self._rank_of(pair) for pair in self.tensors.pairs), default=0)

    def _rank_of(self, pair: Pair) -> int:
        """peft doubles the rank of experts whose gate and up it joins: the rank that was asked for counts."""
        a, place = self.of(pair)[0], pair.place
        rank = a[0] // pair.experts if a else 0
        joins = place.kind is ModuleKind.EXPERTS if place is not None else bool(self.config.target_parameters)
        return min(rank, self.config.r) if joins else rank


def check_compatibility(adapter: AdapterFacts, base: BaseFacts | None, limits: AdapterLimits) -> CompatibilityResult:
    """Whether the adapter fits the base, and the first cause if not. Without a base, only the adapter is checked."""
    found = _sorted(adapter, base)
    mismatch = next(_mismatches(adapter, found, base, limits), None)
    rank = found.rank or adapter.config.r
    targets = suffixes(_changed(pair) for pair in found.tensors.pairs)
    hint = _name_hint(adapter.config, base)
    if mismatch is None:
        notes = (f"rank {rank} on {', '.join(targets)}", hint, *_notes(found.tensors, base))
        return CompatibilityResult(True, None, "; ".join(filter(None, notes)), rank, targets, adapter.size_bytes)
    return CompatibilityResult(False, mismatch.reason, mismatch.message(hint), rank, targets, adapter.size_bytes)


def all_findings(adapter: AdapterFacts, base: BaseFacts | None, limits: AdapterLimits) -> tuple[Finding, ...]:
    """Every cause for which the adapter would be refused."""
    hint = _name_hint(adapter.config, base)
    found = _mismatches(adapter, _sorted(adapter, base), base, limits)
    return tuple(Finding(mismatch.reason, mismatch.message(hint)) for mismatch in found)


def _sorted(adapter: AdapterFacts, base: BaseFacts | None) -> _Adapter:
    tensors = sort_tensors(adapter.shapes, base, adapter.config.target_parameters or ())
    return _Adapter(adapter.config, adapter.shapes, tensors)


def _changed(pair: Pair) -> str:
    return pair.place.module if pair.place is not None else pair.name


def _notes(tensors: AdapterTensors, base: BaseFacts | None) -> tuple[str, ...]:
    """What the summary says of tensors that have no effect, or not yet a result."""
    unused = suffixes(pair.name for pair in tensors.pairs if pair.place and pair.place.kind is ModuleKind.UNUSED)
    notes = []
    if tensors.wholes:
        wholes = ", ".join(_show(whole.name) for whole in tensors.wholes[:MAX_MISMATCHES])
        notes.append(f"{wholes}: a runtime compares the rows with the base's when it loads the adapter")
    if unused:
        notes.append(f"matrices of modules that no text passes have no effect ({', '.join(unused)})")
    if base is None:
        notes.append("not checked against the base yet")
    return tuple(notes)


def _mismatches(
    facts: AdapterFacts, adapter: _Adapter, base: BaseFacts | None, limits: AdapterLimits
) -> Iterator[_Mismatch]:
    """The kinds of mismatch, in the order: bounds, the files themselves, the fit to the base."""
    yield from _too_large(facts, limits)
    yield from _mismatch("empty-tensors", _empty_tensors(facts.shapes))
    yield from _extra_tensors(adapter.tensors)
    yield from _mismatch("several-adapters", ({"tensor": _show(name)} for name in adapter.tensors.repeated))
    yield from _broken_pairs(adapter)
    yield from _rank(adapter, limits)
    unserved = tuple(_unserved_modules(adapter)) if base is not None else ()
    yield from unserved
    misfits = _unlike_base(adapter, base) if base is not None and not unserved else ()
    yield from misfits
    if not misfits and not unserved:
        yield from _against_settings(adapter, base)


def _too_large(adapter: AdapterFacts, limits: AdapterLimits) -> Iterator[_Mismatch]:
    if adapter.size_bytes > limits.max_bytes:
        yield from _mismatch(
            "too-large", [{"where": "the adapter", "size": adapter.size_bytes, "bound": limits.max_bytes}]
        )


def _empty_tensors(shapes: Mapping[str, Shape]) -> Iterator[Mapping[str, object]]:
    return ({"tensor": _show(name), "shape": list(shape)} for name, shape in shapes.items() if 0 in shape)


def _extra_tensors(tensors: AdapterTensors) -> Iterator[_Mismatch]:
    by_cause = sorted((_cause_of(name), name) for name in tensors.extra)
    for cause, group in itertools.groupby(by_cause, key=lambda pair: pair[0]):
        yield from _mismatch(cause, ({"tensor": _show(name)} for _, name in group))


def _cause_of(name: str) -> str:
    """The cause for which a tensor that is not a LoRA matrix is refused."""
    plain = without_wrappers(name)
    return next((cause for expression, cause in TENSORS if re.search(expression, plain)), "surplus-tensor")


def _broken_pairs(adapter: _Adapter) -> Iterator[_Mismatch]:
    found: dict[str, list[Mapping[str, object]]] = {}
    for pair in adapter.tensors.pairs:
        a, b = adapter.of(pair)
        if cause := _broken(adapter.expected_rank(pair), a, b):
            found.setdefault(cause[0], []).append({"module": _show(pair.name), **cause[1]})
    for cause_name, modules in found.items():
        yield from _mismatch(cause_name, modules)


def _broken(rank: int | None, a: Shape | None, b: Shape | None) -> tuple[str, Mapping[str, object]] | None:
    """The cause for which a module's matrices are refused, and the fields of its sentence."""
    if a is None or b is None:
        return "half-a-pair", {"part": f"lora_{'A' if a is None else 'B'}"}
    if 0 in a or 0 in b:
        return None  # an empty tensor has a cause of its own
    if len(a) != 2 or len(b) != 2:
        return "not-matrices", {"a": list(a), "b": list(b)}
    if a[0] != b[1]:
        return "unequal-ranks", {"rank": a[0], "a": list(a), "other": b[1], "b": list(b)}
    return ("other-rank", {"rank": a[0], "other": rank}) if rank is not None and a[0] != rank else None


def _rank(adapter: _Adapter, limits: AdapterLimits) -> Iterator[_Mismatch]:
    if adapter.rank > limits.max_rank:
        found = {"rank": adapter.rank, "bound": limits.max_rank}
        yield from _mismatch("rank-too-high", [found], **found)


def _unserved_modules(adapter: _Adapter) -> Iterator[_Mismatch]:
    """Modules that the base lacks and whose names tell what they are, with the remedy of their kind."""
    found: dict[str, list[str]] = {}
    for pair in adapter.tensors.pairs:
        cause = _UNSERVED.get(kind_by_name(pair.name)) if pair.place is None else None
        if cause is not None:
            found.setdefault(cause, []).append(pair.name)
    for cause, modules in found.items():
        lines = ({"module": _show(module)} for module in modules)
        yield from _mismatch(cause, lines, names=", ".join(suffixes(modules)))


_UNSERVED = {ModuleKind.EXPERTS: "experts", ModuleKind.OUTPUT: "head", ModuleKind.EMBEDDING: "embedding"}


def _unlike_base(adapter: _Adapter, base: BaseFacts) -> tuple[_Mismatch, ...]:
    """Modules that the base lacks or has in another shape."""
    config = adapter.config
    pairs = [pair for pair in adapter.tensors.pairs if all(map(_is_matrix, adapter.of(pair)))]
    unknown = [pair.name for pair in pairs if pair.place is None]
    shaped = [line for pair in pairs if (line := _shape_line(adapter, pair))] + _unlike_wholes(adapter, base)
    if not unknown and not shaped:
        return ()
    # The existing modules are listed for the first layer only: the list is the same for all layers.
    lines = [
        f"the base has no linear layer {_show(module)}{'' if number else _instead(module, base)}"
        for number, module in enumerate(unknown)
    ]
    named = config.base_model_name_or_path
    trained_on = f"; the adapter says it was trained on {_show(named)}" if named else ""
    other_base = bool(shaped) or len(unknown) == len(pairs) or _deeper(unknown, base)
    cause = "wrong-base" if other_base else "unknown-modules"
    return tuple(_mismatch(cause, ({"what": line} for line in shaped + lines), trained_on=trained_on))


def _is_matrix(shape: Shape | None) -> bool:
    return shape is not None and len(shape) == 2


def _shape_line(adapter: _Adapter, pair: Pair) -> str:
    place, (a, b) = pair.place, adapter.of(pair)
    if place is None or a is None or b is None or (b[0], a[1]) == place.shapes:
        return ""
    out_features, in_features = place.shapes
    return f"{_show(pair.name)} is {out_features}x{in_features} in the base but the adapter fits {b[0]}x{a[1]}"


def _unlike_wholes(adapter: _Adapter, base: BaseFacts) -> list[str]:
    return [
        f"{_show(whole.name)} is {'x'.join(map(str, adapter.shapes[whole.name]))}, which has not the base's width"
        for whole in adapter.tensors.wholes
        if not fits(adapter.shapes[whole.name], whole, base)
    ]


def _instead(module: str, base: BaseFacts) -> str:
    """The modules that the base has in that place, as the end of a sentence; empty when there are none."""
    parent, _, _ = module.rpartition(".")
    siblings = sorted({name.rpartition(".")[2] for name in base.spelled if name.rpartition(".")[0] == parent})
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
    known = {_LAYER.sub(".#.", name) for name in base.spelled}
    return all(_LAYER.sub(".#.", module) in known for module in unknown)


def _against_settings(adapter: _Adapter, base: BaseFacts | None) -> Iterator[_Mismatch]:
    """Modules that only the tensors or only the settings name."""
    pairs = adapter.tensors.pairs
    surplus = (pair.name for pair in pairs if not _is_targeted(pair, adapter.config))
    yield from _mismatch("untargeted", ({"module": _show(name)} for name in surplus))
    yield from _mismatch("without-weights", ({"module": _show(name)} for name in _missing(adapter, base)))
    yield from _mismatch("some-experts", _incomplete_experts(adapter.tensors))
    if not pairs:
        yield from _mismatch("changes-nothing", [{}])


def _is_targeted(pair: Pair, config: AdapterConfig) -> bool:
    """False where the settings say that the module was not trained."""
    if is_parameter(pair.setting, config.target_parameters or ()) or (pair.place is None and config.target_parameters):
        return True  # without a base, the names of parameters are not known
    if config.ensure_weight_tying and kind_by_name(pair.name) is ModuleKind.OUTPUT:
        return True
    return config.targets(pair.setting) is not False


def _missing(adapter: _Adapter, base: BaseFacts | None) -> list[str]:
    """The modules that the settings name by every spelling, and that have no matrices."""
    if base is None:
        return []
    present = {pair.place.module for pair in adapter.tensors.pairs if pair.place is not None}
    return sorted(
        module.name
        for module in base.modules.values()
        if module.name not in present
        and all(map(adapter.config.targets, (module.name, *module.aliases)))
        # an output layer or embedding may be trained by its whole, and what no text passes has no effect
        and module.kind is ModuleKind.LINEAR
    )


def _incomplete_experts(tensors: AdapterTensors) -> Iterator[Mapping[str, object]]:
    """Matrices that some experts of the base have a pair for and others have none."""
    held: dict[str, int] = defaultdict(int)
    total: dict[str, int] = {}
    for pair in tensors.pairs:
        if pair.place is not None and pair.place.expert is not None:
            held[pair.place.module] += 1
            total[pair.place.module] = pair.place.of_experts
    for module, count in sorted(held.items()):
        if count != total[module]:
            yield {"module": _show(module), "count": count, "total": total[module]}


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
