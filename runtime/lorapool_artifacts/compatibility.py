"""Checks whether an adapter fits a base, from headers and settings, before anything is loaded.

Pure. Shapes decide; names are used in messages only. Every tensor must be used and every targeted module must have
its pair of matrices: an adapter that applies only in part would answer almost like the base, unnoticed. Two things
have no effect and are left out: copies of the base's embeddings whose rows are the base's own, which only a runtime
can compare, and matrices of modules that no text passes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorapool_api.base_modules import ModuleKind
from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import AdapterConfig, suffixes
from lorapool_artifacts.adapter_tensors import (
    AdapterTensors,
    Pair,
    Shape,
    fits,
    kind_by_name,
    shapes_of,
    sort_tensors,
)
from lorapool_artifacts.base_facts import BaseFacts, is_parameter
from lorapool_artifacts.peft_settings import TENSORS
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
class _Mismatch:
    """Why the adapter does not fit: one line per mismatch, and one remedy for all."""

    reason: FailureReason
    lines: tuple[str, ...]
    remedy: str


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter with its tensors sorted."""

    config: AdapterConfig
    shapes: Mapping[str, Shape]
    tensors: AdapterTensors

    def of(self, pair: Pair) -> tuple[Shape | None, Shape | None]:
        """The shapes of A and B."""
        return shapes_of(pair, self.shapes)

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
    """Whether the adapter fits the base. Without a base, only the adapter itself is checked."""
    config = adapter.config
    tensors = sort_tensors(adapter.shapes, base, config.target_parameters or ())
    sorted_adapter = _Adapter(config, adapter.shapes, tensors)
    mismatch = _too_large(adapter, limits) or _first_mismatch(sorted_adapter, base, limits)
    rank = sorted_adapter.rank or config.r
    targets = suffixes(_changed(pair) for pair in tensors.pairs)
    hint = _name_hint(config, base)
    if mismatch is None:
        summary = "; ".join(filter(None, (f"rank {rank} on {', '.join(targets)}", hint, *_notes(tensors, base))))
        return CompatibilityResult(True, None, summary, rank, targets, adapter.size_bytes)
    described = "; ".join(mismatch.lines[:MAX_MISMATCHES])
    more = f"; and {len(mismatch.lines) - MAX_MISMATCHES} more" if len(mismatch.lines) > MAX_MISMATCHES else ""
    explained = f" ({hint})" if hint and mismatch.reason is FailureReason.WRONG_BASE else ""
    message = f"{described}{more}{explained}. {mismatch.remedy}"
    return CompatibilityResult(False, mismatch.reason, message, rank, targets, adapter.size_bytes)


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


def _first_mismatch(adapter: _Adapter, base: BaseFacts | None, limits: AdapterLimits) -> _Mismatch | None:
    """The first kind of mismatch, in the order: the files themselves, bounds, the fit to the base."""
    return (
        _extra_tensors(adapter)
        or _broken_pairs(adapter)
        or _rank(adapter, limits)
        or (_unserved_modules(adapter, base) if base is not None else None)
        or (_unlike_base(adapter, base) if base is not None else None)
        or _against_settings(adapter, base)
    )


def _too_large(adapter: AdapterFacts, limits: AdapterLimits) -> _Mismatch | None:
    if adapter.size_bytes <= limits.max_bytes:
        return None
    line = f"the adapter is {adapter.size_bytes} bytes, more than the {limits.max_bytes} allowed"
    return _Mismatch(
        FailureReason.TOO_LARGE, (line,), "Save it in bf16, or train with a smaller rank or fewer target modules."
    )


def _extra_tensors(adapter: _Adapter) -> _Mismatch | None:
    if not adapter.tensors.extra:
        return None
    lines = tuple(f"tensor {_show(name)} {_what_is(name)}" for name in adapter.tensors.extra)
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
    if name.endswith(".weight") and ".lora_" not in name:
        return "is a whole matrix of the base, which all adapters share"
    if re.search(r"\.lora_[AB]\.[^.]+\.weight$", name):
        return "carries an adapter name, so it was not written by save_pretrained()"
    return "is not part of a LoRA adapter"


def _broken_pairs(adapter: _Adapter) -> _Mismatch | None:
    lines = [line for pair in adapter.tensors.pairs if (line := _broken(adapter, pair))]
    if not lines:
        return None
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained().",
    )


def _broken(adapter: _Adapter, pair: Pair) -> str:
    """Why the two matrices of a name are no pair; empty when they are one."""
    module, (a, b) = _show(pair.name), adapter.of(pair)
    if a is None or b is None:
        return f"{module} has no lora_{'A' if a is None else 'B'} weight"
    if len(a) != 2 or len(b) != 2 or 0 in a or 0 in b:
        return f"{module} has lora_A {list(a)} and lora_B {list(b)}, which are not two-dimensional matrices"
    if a[0] != b[1]:
        return f"{module} has rank {a[0]} in lora_A {list(a)} but {b[1]} in lora_B {list(b)}"
    if pair.place is None and adapter.config.target_parameters:
        return ""  # how many experts a rank is for is not known
    rank = adapter.config.rank_of(pair.setting) * pair.experts
    return f"{module} has rank {a[0]} but adapter_config.json says {rank}" if a[0] != rank else ""


def _rank(adapter: _Adapter, limits: AdapterLimits) -> _Mismatch | None:
    if adapter.rank <= limits.max_rank:
        return None
    line = f"the adapter's rank is {adapter.rank}, the base allows {limits.max_rank}"
    return _Mismatch(
        FailureReason.RANK_TOO_HIGH,
        (line,),
        f"Train with r <= {limits.max_rank}, or raise spec.lora.maxRank of the BaseModel.",
    )


def _unserved_modules(adapter: _Adapter, base: BaseFacts) -> _Mismatch | None:
    """Modules that adapters cannot change in this base, and for whose kind there is a remedy."""
    lines, remedies = [], []
    for pair in adapter.tensors.pairs:
        if pair.place is None and (found := _UNSERVED.get(kind_by_name(pair.name))) is not None:
            lines.append(f"{_show(pair.name)} is {found[0]} that adapters cannot change on this base")
            remedies.append(found[1])
    return _Mismatch(FailureReason.INCOMPATIBLE, tuple(lines), remedies[0]) if lines else None


_UNSERVED = {
    ModuleKind.EXPERTS: (
        "an expert of a mixture",
        "Train it with target_modules that leave the experts out, such as q_proj, k_proj, v_proj and o_proj: with "
        "gate_proj, up_proj or down_proj among them, peft targets the experts too.",
    ),
    ModuleKind.OUTPUT: ("an output layer", "Train it without the output layer in target_modules."),
    ModuleKind.EMBEDDING: ("an embedding", "Train it without the embedding in target_modules."),
}


def _unlike_base(adapter: _Adapter, base: BaseFacts) -> _Mismatch | None:
    """Modules that the base lacks or has in another shape."""
    config, pairs = adapter.config, adapter.tensors.pairs
    unknown = [pair.name for pair in pairs if pair.place is None]
    shaped = [line for pair in pairs if (line := _shape_line(adapter, pair))] + _unlike_wholes(adapter, base)
    if not unknown and not shaped:
        return None
    # The existing modules are listed for the first layer only: the list is the same for all layers.
    lines = [
        f"the base has no linear layer {_show(module)}{'' if number else _instead(module, base)}"
        for number, module in enumerate(unknown)
    ]
    trained_on = (
        f"; the adapter says it was trained on {_show(config.base_model_name_or_path)}"
        if config.base_model_name_or_path
        else ""
    )
    if shaped or len(unknown) == len(pairs) or _deeper(unknown, base):
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


def _against_settings(adapter: _Adapter, base: BaseFacts | None) -> _Mismatch | None:
    """Modules that only the tensors or only the settings name."""
    config = adapter.config
    lines = [
        f"{_show(pair.name)} has weights but is not in target_modules"
        for pair in adapter.tensors.pairs
        if not _is_targeted(pair, config)
    ]
    lines += [f"{_show(module)} is targeted but has no weights" for module in _missing(adapter, base)]
    lines += _incomplete_experts(adapter.tensors)
    if not adapter.tensors.pairs:
        lines.append("no module of the base is changed")
    if not lines:
        return None
    return _Mismatch(
        FailureReason.INCOMPATIBLE,
        tuple(lines),
        "Upload adapter_config.json and adapter_model.safetensors of one and the same save_pretrained().",
    )


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


def _incomplete_experts(tensors: AdapterTensors) -> list[str]:
    """Matrices that some experts of the base have a pair for and others have none."""
    held: dict[str, int] = defaultdict(int)
    total: dict[str, int] = {}
    for pair in tensors.pairs:
        if pair.place is not None and pair.place.expert is not None:
            held[pair.place.module] += 1
            total[pair.place.module] = pair.place.of_experts
    return [
        f"{_show(module)} has weights for {count} of {total[module]} experts"
        for module, count in sorted(held.items())
        if count != total[module]
    ]


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
