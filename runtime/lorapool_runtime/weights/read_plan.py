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

from lorapool_artifacts.adapter_config import AdapterConfig
from lorapool_artifacts.header import TensorInfo
from lorapool_artifacts.tensor_names import pair_of
from lorapool_runtime.weights.layout import Layout, lay_out
from lorapool_runtime.weights.pack import FILE_TYPES, MATRIX_FIELDS
from lorapool_runtime.weights.targets import TargetGroup

MAX_PLANS = 64
"""About 100 KiB each for a base of thirty layers."""


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


def plan_reading(
    groups: Sequence[TargetGroup],
    config: AdapterConfig,
    tensors: Mapping[str, TensorInfo],
    *,
    itemsize: int,
    target_modules: tuple[str, ...],
) -> ReadPlan:
    """The plan for tensors that were validated as complete. itemsize: bytes per element of the buffer.

    B matrices are transposed and scaled.
    """
    pairs: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        if pair := pair_of(name):
            pairs.setdefault(pair[0], {})[pair[1]] = info
    modules = [module for group in groups for module in group.modules]
    ranks = tuple(config.rank_of(module) if module in pairs else 0 for module in modules)
    layout = lay_out(tuple(groups), ranks, itemsize)
    found: list[tuple[tuple[int, ...], float, str]] = []
    for module, linear in zip(modules, layout.linears, strict=True):
        if module in pairs:
            found.append((_matrix(pairs[module]["A"], linear.a_at, transposed=False), 1.0, module))
            found.append((_matrix(pairs[module]["B"], linear.b_at, transposed=True), config.scaling_of(module), module))
    found.sort(key=lambda one: one[0])
    return ReadPlan(
        rank=layout.rank,
        target_modules=target_modules,
        layout=layout,
        matrices=np.array([matrix for matrix, _, _ in found], np.int64).reshape(-1, len(MATRIX_FIELDS)),
        scales=np.array([scale for _, scale, _ in found], np.float32),
        modules=tuple(module for _, _, module in found),
    )


def _matrix(info: TensorInfo, to: int, *, transposed: bool) -> tuple[int, ...]:
    rows, cols = info.shape
    return info.start, FILE_TYPES.index(info.dtype), rows, cols, int(transposed), to


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
