"""The modules of a base by every name that adapters may use for them. Pure.

A runtime makes the list from the model it has loaded (`lorapool_runtime.base_modules`); nothing here guesses it from
the names in the base's files, which differ from those of the loaded model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lorapool_api.base_modules import BaseModule, BaseModules, ModuleKind, expand

_INNER = ".base_layer"
"""Ends the name of a parameter's wrapper around which peft has put another one."""


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The properties of a base that adapters depend on."""

    modules: Mapping[str, BaseModule]
    """By the name in the loaded model."""
    names: frozenset[str] = frozenset()
    """Known names of the base (repository, `_name_or_path`, served name), for messages only."""
    spelled: Mapping[str, BaseModule] = field(default_factory=dict)
    """By every accepted name."""
    experts: Mapping[str, tuple[BaseModule, ...]] = field(default_factory=dict)
    """By every accepted name of a module that holds experts: its parameters, in the order of the model."""

    @classmethod
    def of(cls, modules: Iterable[BaseModule], *names: str) -> BaseFacts:
        found = {module.name: module for module in modules}
        spelled: dict[str, BaseModule] = {}
        experts: dict[str, tuple[BaseModule, ...]] = {}
        for module in found.values():
            for name in (module.name, *module.aliases):
                if module.kind is ModuleKind.EXPERTS:
                    holder = name.rpartition(".")[0]
                    experts[holder] = (*experts.get(holder, ()), module)
                else:
                    spelled.setdefault(name, module)
        return cls(found, frozenset(name for name in names if name), spelled | found, experts)

    @classmethod
    def published(cls, modules: BaseModules, *names: str) -> BaseFacts:
        """The facts that a runtime has published. Raises ValueError for a damaged list."""
        return cls.of(expand(modules), *names)

    def with_names(self, *names: str) -> BaseFacts:
        """The same facts with more names; empty ones are ignored."""
        return replace(self, names=self.names | {name for name in names if name})


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a base that one pair of matrices changes."""

    module: str
    """Its name in the loaded model."""
    setting: str
    """The name that the settings of the adapter are matched with."""
    kind: ModuleKind
    out_features: int
    in_features: int
    experts: int = 1
    """Matrices that each tensor joins."""
    expert: int | None = None
    """Of a pair for one expert: which."""
    of_experts: int = 1
    """And how many the base has."""

    @property
    def shapes(self) -> tuple[int, int]:
        """(rows of B, columns of A)."""
        return self.out_features, self.in_features


def place_of(name: str, base: BaseFacts, parameters: Iterable[str]) -> Place | None:
    """What a pair of matrices of that name changes; None where the base has nothing of that name.

    parameters: the setting target_parameters. It decides which experts a name without a parameter means.
    """
    parameters = tuple(parameters)
    module = base.spelled.get(name)
    if module is not None and module.kind is not ModuleKind.EXPERTS:
        setting = f"{name}.weight" if is_parameter(f"{name}.weight", parameters) else name
        return Place(module.name, setting, module.kind, module.out_features, module.in_features)
    return _fused_experts(name, base, parameters) or _one_expert(name, base)


def _fused_experts(name: str, base: BaseFacts, parameters: tuple[str, ...]) -> Place | None:
    """peft wraps one parameter after the other: the last one has the plain name, the one before `<name>.base_layer`."""
    holder = name
    while holder.endswith(_INNER):
        holder = holder.removesuffix(_INNER)
    depth = (len(name) - len(holder)) // len(_INNER)
    targeted = [module for module in base.experts.get(holder, ()) if is_parameter(module.name, parameters)]
    if depth >= len(targeted):
        return None
    module = targeted[-1 - depth]
    return Place(module.name, module.name, module.kind, module.out_features, module.in_features, module.experts)


def is_parameter(name: str, parameters: Iterable[str]) -> bool:
    """Whether target_parameters names this parameter, by peft's rule."""
    return any(name == given or name.endswith(f".{given}") for given in parameters)


def _one_expert(name: str, base: BaseFacts) -> Place | None:
    holder, _, rest = name.rpartition(".experts.")
    number, _, part = rest.partition(".")
    for module in base.experts.get(f"{holder}.experts", ()):
        if part in module.parts and number.isdecimal() and int(number) < module.experts:
            return _part(module, part, name, int(number))
    return None


def _part(module: BaseModule, part: str, name: str, expert: int) -> Place:
    out_features = module.out_features // len(module.parts)
    joined = module.name if len(module.parts) == 1 else f"{module.name.rpartition('.')[0]}.{part}"
    return Place(joined, name, module.kind, out_features, module.in_features, expert=expert, of_experts=module.experts)
