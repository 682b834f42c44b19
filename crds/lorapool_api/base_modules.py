"""The modules of a loaded base that adapters may name: published by runtimes, kept in the BaseModel's status.

A base of fifty layers has hundreds of modules, one with unfused experts tens of thousands. Names that differ in numbers
only are one entry, so that the whole takes about two kilobytes.

    model.layers.{}.self_attn.q_proj with numbers 0-27  =  28 modules of equal shape
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from lorapool_api.common import ApiModel

MAX_ENTRIES = 4096
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
_HOLE = "{}"


class ModuleKind(StrEnum):
    """What an adapter may change in a module."""

    LINEAR = "linear"
    """A linear layer inside the model."""
    OUTPUT = "output"
    """The output layer, `lm_head`."""
    EMBEDDING = "embedding"
    """The embedding of tokens."""
    EXPERTS = "experts"
    """One matrix for each expert of a mixture, in one parameter."""
    PARAMETER = "parameter"
    """A matrix that is a parameter of its module, such as the router of a mixture."""
    UNUSED = "unused"
    """A linear layer that no text passes, as in a vision tower: what adapters change there has no effect."""


Name = Annotated[str, Field(max_length=512)]


class ModuleEntry(ApiModel):
    """Modules whose names differ in numbers only."""

    name: Name = Field(description="The name in the loaded model, with {} in place of each number.")
    numbers: list[Name] = Field(
        default_factory=list, max_length=8, description="For each {}, the numbers, as in 0-27 or 0-2,5."
    )
    kind: ModuleKind = ModuleKind.LINEAR
    """What adapters may change there."""
    out_features: int = Field(ge=1)
    """Rows of the weight; of an embedding, its width."""
    in_features: int = Field(ge=1)
    """Columns of the weight; of an embedding, the number of tokens."""
    experts: int = Field(default=1, ge=1)
    """Matrices in the parameter."""
    parts: list[Name] = Field(
        default_factory=list,
        max_length=4,
        description="Of experts: the names of the matrices that the parameter joins, as in the base's files.",
    )
    aliases: list[Name] = Field(
        default_factory=list,
        max_length=16,
        description="Other names of the same modules that peft accepts, as in the base's files.",
    )


class BaseModules(ApiModel):
    """Response of `GET /v1/base/modules`."""

    digest: str | None = Field(default=None, max_length=80, description="Digest of the base's files.")
    modules: list[ModuleEntry] = Field(max_length=MAX_ENTRIES, description="All modules that adapters may name.")


@dataclass(frozen=True, slots=True)
class BaseModule:
    """One module of the loaded base."""

    name: str
    out_features: int
    in_features: int
    kind: ModuleKind = ModuleKind.LINEAR
    experts: int = 1
    parts: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def compact(modules: Iterable[BaseModule], digest: str | None = None) -> BaseModules:
    """Joins modules whose names differ in numbers only."""
    numbers: dict[BaseModule, set[tuple[int, ...]]] = defaultdict(set)
    for module in modules:
        numbers[_template(module)].add(_numbers(module.name))
    entries = [_entry(template, ranges) for template, rows in numbers.items() for ranges in _products(frozenset(rows))]
    return BaseModules(digest=digest, modules=entries)


def expand(published: BaseModules) -> Iterator[BaseModule]:
    """The modules one by one. Raises ValueError for numbers that do not fit the names."""
    for entry in published.modules:
        for row in itertools.product(*(_listed(text) for text in entry.numbers)):
            yield BaseModule(
                _filled(entry.name, row),
                entry.out_features,
                entry.in_features,
                entry.kind,
                entry.experts,
                tuple(entry.parts),
                tuple(_filled(alias, row) for alias in entry.aliases),
            )


def _template(module: BaseModule) -> BaseModule:
    """The module with a hole for each number; aliases with other numbers are left out."""
    row = _numbers(module.name)
    aliases = tuple(_NUMBER.sub(_HOLE, alias) for alias in module.aliases if _numbers(alias) == row)
    return replace(module, name=_NUMBER.sub(_HOLE, module.name), aliases=aliases)


def _entry(template: BaseModule, ranges: tuple[str, ...]) -> ModuleEntry:
    return ModuleEntry(
        name=template.name,
        numbers=list(ranges),
        kind=template.kind,
        out_features=template.out_features,
        in_features=template.in_features,
        experts=template.experts,
        parts=list(template.parts),
        aliases=list(template.aliases),
    )


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(name))


def _filled(template: str, row: tuple[int, ...]) -> str:
    return template.replace(_HOLE, "%d") % row if row else template


def _products(rows: frozenset[tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """The rows as products of ranges: {(0, 0), (0, 1), (1, 0), (1, 1)} is ("0-1", "0-1")."""
    if rows == {()}:
        yield ()
        return
    tails: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for head, *tail in rows:
        tails[head].add(tuple(tail))
    heads: dict[frozenset[tuple[int, ...]], list[int]] = defaultdict(list)
    for head, rest in tails.items():
        heads[frozenset(rest)].append(head)
    for tail_rows, numbers in heads.items():
        for ranges in _products(tail_rows):
            yield (_ranges(sorted(numbers)), *ranges)


def _ranges(numbers: list[int]) -> str:
    runs = [[number for _, number in run] for _, run in itertools.groupby(enumerate(numbers), lambda n: n[1] - n[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _listed(text: str) -> list[int]:
    ends = [(int(first), int(last or first)) for first, _, last in (part.partition("-") for part in text.split(","))]
    return [number for first, last in ends for number in range(first, last + 1)]
