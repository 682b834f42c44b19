"""What each tensor of an adapter is: a matrix of a pair, a whole embedding, or nothing that can be served. Pure.

adapter tensor                                        base
base_model.model.<module>.lora_A.weight [r, in]       linear and output layers [out, in]
base_model.model.<module>.lora_B.weight [out, r]
base_model.model.<module>.lora_embedding_A [r, in]    embeddings of in tokens and width out
base_model.model.<module>.lora_embedding_B [out, r]
base_model.model.<holder>.lora_A.weight [r n, in]     parameters of n experts, named in target_parameters
base_model.model.<holder>.<n>.<part>.lora_A.weight    one matrix of one expert
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorapool_api.base_modules import ModuleKind
from lorapool_artifacts.checks.base_facts import BaseFacts, Place, place_of
from lorapool_artifacts.checks.peft_settings import HARMLESS_TENSORS
from lorapool_artifacts.checks.tensor_names import matrix_of, whole_of

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings"})
_OUTPUTS = frozenset({"lm_head", "embed_out"})
_EXPERT = re.compile(r"\.experts(?:\.|$)")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two matrices of one name; a tensor's name is empty where it is missing."""

    name: str
    place: Place | None
    """None where the base has nothing of that name."""
    of_embedding: bool
    a: str = ""
    b: str = ""

    @property
    def setting(self) -> str:
        """The name that the settings of the adapter are matched with."""
        return self.place.setting if self.place is not None else self.name

    @property
    def experts(self) -> int:
        return self.place.experts if self.place is not None else 1


@dataclass(frozen=True, slots=True)
class Whole:
    """A copy of an embedding or output layer, as peft saves with resized or targeted ones."""

    name: str
    module: str
    """Its name in the loaded base, or in the file where the base is not known."""
    kind: ModuleKind


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    pairs: tuple[Pair, ...]
    """Sorted by name."""
    wholes: tuple[Whole, ...]
    extra: tuple[str, ...]
    """Names of tensors that are nothing of these, sorted."""
    repeated: tuple[str, ...] = ()
    """Names of tensors that stand for the same matrix as another one, sorted."""


def sort_tensors(names: Iterable[str], base: BaseFacts | None, parameters: Iterable[str]) -> AdapterTensors:
    """Without a base, the names alone decide. parameters: the setting target_parameters."""
    found: dict[tuple[str, bool], dict[str, str]] = {}
    wholes: list[Whole] = []
    extra: list[str] = []
    repeated: list[str] = []
    for name in names:
        if (matrix := matrix_of(name)) is not None:
            parts = found.setdefault((matrix.module, matrix.of_embedding), {})
            if matrix.part in parts:
                repeated.append(name)
            parts[matrix.part] = name
        elif (whole := _whole(name, base)) is not None:
            wholes.append(whole)
        elif name.rpartition(".")[2] not in HARMLESS_TENSORS:
            extra.append(name)
    parameters = tuple(parameters)
    pairs = (
        Pair(module, _placed(module, base, parameters), of_embedding, parts.get("A", ""), parts.get("B", ""))
        for (module, of_embedding), parts in sorted(found.items())
    )
    return AdapterTensors(tuple(pairs), tuple(wholes), tuple(sorted(extra)), tuple(sorted(repeated)))


def _placed(module: str, base: BaseFacts | None, parameters: tuple[str, ...]) -> Place | None:
    return place_of(module, base, parameters) if base is not None else None


def _whole(name: str, base: BaseFacts | None) -> Whole | None:
    module = whole_of(name)
    if module is None:
        return None
    if base is None:
        kind = kind_by_name(module)
        return Whole(name, module, kind) if kind in (ModuleKind.EMBEDDING, ModuleKind.OUTPUT) else None
    known = base.spelled.get(module)
    if known is None or known.kind not in (ModuleKind.EMBEDDING, ModuleKind.OUTPUT):
        return None
    return Whole(name, known.name, known.kind)


def kind_by_name(module: str) -> ModuleKind:
    """What a module probably is, where the base is not known."""
    last = module.rpartition(".")[2]
    if last in _EMBEDDINGS:
        return ModuleKind.EMBEDDING
    if last in _OUTPUTS:
        return ModuleKind.OUTPUT
    return ModuleKind.EXPERTS if _EXPERT.search(module) else ModuleKind.LINEAR


def fits(shape: Shape, whole: Whole, base: BaseFacts) -> bool:
    """Whether a whole matrix has the width of the base's; the number of its rows may differ."""
    module = base.modules[whole.module]
    width = module.out_features if whole.kind is ModuleKind.EMBEDDING else module.in_features
    return len(shape) == 2 and shape[1] == width and shape[0] > 0


def shapes_of(pair: Pair, shapes: Mapping[str, Shape]) -> tuple[Shape | None, Shape | None]:
    """The shapes of A and B, None for a missing one."""
    return shapes.get(pair.a), shapes.get(pair.b)
