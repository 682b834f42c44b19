"""Which bytes of an adapter's file are read and where they are stored, computed once per config and shapes.

Thousands of adapters are trained with the same settings on the same base. The headers of their files are equal byte
for byte, and so are the results of validation, the layout and the positions of all matrices. A plan holds these and
no weights. `ReadPlanCache` keeps the plans used last; an adapter that was refused is validated again each time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorapool_api.base_modules import ModuleKind
from lorapool_artifacts.checks.adapter_config import AdapterConfig
from lorapool_artifacts.checks.adapter_tensors import AdapterTensors
from lorapool_artifacts.checks.base_facts import Place
from lorapool_artifacts.checks.header import TensorInfo
from lorapool_runtime.weights.layout import Layout, PackedLinear, lay_out
from lorapool_runtime.weights.pack import FILE_TYPES, MATRIX_FIELDS
from lorapool_runtime.weights.targets import TargetGroup

MAX_PLANS = 64
"""About 100 KiB each for a base of thirty layers."""


@dataclass(frozen=True, slots=True)
class Interleaved:
    """A region whose rows the file has rank by rank, and the buffer has expert by expert."""

    at: int
    rank: int
    experts: int
    width: int

    def sort(self, buffer: np.ndarray) -> None:
        """Reorders the rows in place."""
        region = buffer[self.at : self.at + self.rank * self.experts * self.width]
        rows = region.reshape(self.rank, self.experts, self.width)
        region[:] = rows.transpose(1, 0, 2).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class ReadPlan:
    rank: int
    target_modules: tuple[str, ...]
    layout: Layout
    matrices: np.ndarray
    """int64 [matrices, len(MATRIX_FIELDS)], in the order of the file, which is read from front to back."""
    scales: np.ndarray
    """float32 [matrices], the factor of each matrix."""
    modules: tuple[str, ...]
    """The module of each matrix."""
    interleaved: tuple[Interleaved, ...] = ()
    """What has to be sorted after reading."""
    copies: tuple[tuple[str, TensorInfo], ...] = ()
    """Modules of the base of which the file has a whole matrix, which must equal the base's."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    info: TensorInfo
    to: int
    transposed: bool
    scale: float
    module: str

    @property
    def fields(self) -> tuple[int, ...]:
        rows, cols = self.info.shape
        return self.info.start, FILE_TYPES.index(self.info.dtype), rows, cols, int(self.transposed), self.to


def plan_reading(
    groups: Sequence[TargetGroup],
    config: AdapterConfig,
    header: Mapping[str, TensorInfo],
    tensors: AdapterTensors,
    *,
    itemsize: int,
    rank: int,
    target_modules: tuple[str, ...],
) -> ReadPlan:
    """The plan for tensors that were validated as complete. itemsize: bytes per element of the buffer; rank and
    target_modules are reported.

    B matrices are transposed and scaled, as are the A matrices of embeddings. Matrices of modules that no text passes
    are left out.
    """
    modules = [module for group in groups for module in group.modules]
    known = set(modules)
    pairs = [(pair, pair.place) for pair in tensors.pairs if pair.place is not None and pair.place.module in known]
    rank_of = {place.module: config.rank_of(place.setting) for _, place in pairs}
    layout = lay_out(tuple(groups), tuple(rank_of.get(module, 0) for module in modules), itemsize)
    linears = dict(zip(modules, layout.linears, strict=True))
    found = [
        matrix
        for pair, place in pairs
        for matrix in _of_pair(header[pair.a], header[pair.b], place, linears[place.module], config)
    ]
    found.sort(key=lambda matrix: matrix.fields)
    return ReadPlan(
        rank=rank,
        target_modules=target_modules,
        layout=layout,
        matrices=np.array([matrix.fields for matrix in found], np.int64).reshape(-1, len(MATRIX_FIELDS)),
        scales=np.array([matrix.scale for matrix in found], np.float32),
        modules=tuple(matrix.module for matrix in found),
        interleaved=tuple(
            Interleaved(linears[place.module].b_at, rank_of[place.module], place.experts, place.out_features)
            for _, place in pairs
            if place.experts > 1
        ),
        copies=tuple((whole.module, header[whole.name]) for whole in tensors.wholes),
    )


def _of_pair(
    a: TensorInfo, b: TensorInfo, place: Place, linear: PackedLinear, config: AdapterConfig
) -> tuple[_Matrix, _Matrix]:
    before = (place.expert or 0) * config.rank_of(place.setting)  # rows of the experts before this one
    embeds = place.kind is ModuleKind.EMBEDDING
    return (
        _Matrix(a, linear.a_at + before * place.in_features, embeds, 1.0, place.module),
        _Matrix(b, linear.b_at + before * place.out_features, True, config.scaling_of(place.setting), place.module),
    )


class ReadPlanCache:
    """The plans used last. Thread-safe; two threads may compute the same plan concurrently."""

    def __init__(self, max_plans: int = MAX_PLANS) -> None:
        self._max_plans = max_plans
        self._lock = threading.Lock()
        self._plans: OrderedDict[object, ReadPlan] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._plans)

    def get(self, key: object, make: Callable[[], ReadPlan]) -> ReadPlan:
        """The plan of `key`, made by `make` where it is not cached. Exceptions of `make` pass through."""
        with self._lock:
            if (plan := self._plans.get(key)) is not None:
                self._plans.move_to_end(key)
                return plan
        plan = make()
        with self._lock:
            self._plans[key] = plan
            self._plans.move_to_end(key)
            while len(self._plans) > self._max_plans:
                self._plans.popitem(last=False)
        return plan
