"""Reads a verified folder into an adapter that is packed for its slot, with every tensor used and every value usable.

`lorapool_artifacts.checks.compatibility` decides whether an adapter fits, as in the operator, but with the layers of
the loaded base. This module refuses files that cannot be read and values that are not finite or too large, and
names the remedy. It runs in worker threads, hence without torch. It never unpickles and never passes a folder to peft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from lorapool_api.base_modules import BaseModule
from lorapool_api.common import FailureReason
from lorapool_artifacts.checks.adapter_config import AdapterConfig, parse_adapter_config
from lorapool_artifacts.checks.adapter_tensors import sort_tensors
from lorapool_artifacts.checks.base_facts import BaseFacts
from lorapool_artifacts.checks.causes import refusal
from lorapool_artifacts.checks.compatibility import AdapterFacts, check_compatibility
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorapool_artifacts.settings import AdapterLimits
from lorapool_runtime.host_memory import huge_page_zeros
from lorapool_runtime.weights.layout import Layout
from lorapool_runtime.weights.originals import StoredMatrix, first_changed_row
from lorapool_runtime.weights.pack import MATRIX_FIELDS, TOO_LARGE, UNTHROTTLED, Throttle, pack_file
from lorapool_runtime.weights.read_plan import ReadPlan, ReadPlanCache, plan_reading
from lorapool_runtime.weights.safetensors_file import WeightsFile, open_weights
from lorapool_runtime.weights.targets import TargetGroup


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedAdapter:
    """`interface.HostAdapter`: an immutable adapter in one contiguous buffer, with the layout of its slot.

    The host cache and, on a CPU, the slots share it. It can be weakly referenced, to see when its last owner drops it.
    """

    rank: int
    target_modules: tuple[str, ...]
    layout: Layout
    buffer: np.ndarray
    """[layout.elements]. bfloat16 as its 16-bit patterns, because NumPy has no type for it."""

    @property
    def host_bytes(self) -> int:
        return self.buffer.nbytes


class AdapterReader:
    """Reads adapters for one base."""

    def __init__(
        self,
        groups: Sequence[TargetGroup],
        dtype: str,
        base: BaseFacts | None = None,
        originals: Mapping[str, StoredMatrix] | None = None,
    ) -> None:
        """dtype: the type the base computes in (float32, float16 or bfloat16).

        base: the modules by all their names; None: the groups' own names only. originals: the base's matrices of which
        adapters may have copies, by module.
        """
        self._groups = tuple(groups)
        self._dtype = dtype
        self._element = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        self._base = base or base_facts(groups)
        self._originals = originals or {}
        self._plans = ReadPlanCache()

    def read(self, folder: Path, *, max_rank: int, throttle: Throttle = UNTHROTTLED) -> PackedAdapter:
        """Blocks until the adapter is in memory. Raises ArtifactError."""
        with self._planned(folder, max_rank) as (file, plan):
            buffer = huge_page_zeros(plan.layout.elements, self._element)
            self._pack(file, plan, plan.matrices, buffer, throttle)
        for region in plan.interleaved:
            region.sort(buffer)
        return PackedAdapter(plan.rank, plan.target_modules, plan.layout, buffer)

    def check(self, folder: Path, *, max_rank: int, throttle: Throttle = UNTHROTTLED) -> ReadPlan:
        """Reads every value as `read` does, and keeps none. Blocks. Raises ArtifactError."""
        with self._planned(folder, max_rank) as (file, plan):
            matrices = plan.matrices.copy()
            matrices[:, MATRIX_FIELDS.index("to")] = 0  # one after the other into the same memory
            rows, cols = (matrices[:, MATRIX_FIELDS.index(name)] for name in ("rows", "cols"))
            scratch = np.empty((rows * cols).max(initial=0), self._element)
            self._pack(file, plan, matrices, scratch, replace(throttle, threads=1))
        return plan

    @contextmanager
    def _planned(self, folder: Path, max_rank: int) -> Iterator[tuple[WeightsFile, ReadPlan]]:
        """The open file and what is to be read from it. Raises ArtifactError, also for errors while inside."""
        try:
            config = _read_config(folder)
            with open_weights(_weights_of(folder)) as file:
                plan = self._plans.get(
                    (hashlib.sha256(file.head).digest(), file.size_bytes, config.meaning(), max_rank),
                    lambda: self._plan(config, file, max_rank),
                )
                self._compare_copies(file.descriptor, plan)
                yield file, plan
        except (OSError, EOFError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            _refuse(FailureReason.CORRUPT_ARTIFACT, f"{ADAPTER_WEIGHTS} cannot be read ({why}); upload it again.")

    def _pack(
        self, file: WeightsFile, plan: ReadPlan, matrices: np.ndarray, buffer: np.ndarray, throttle: Throttle
    ) -> None:
        first_unusable = pack_file(file.descriptor, buffer, matrices, plan.scales, throttle)
        if first_unusable is not None:
            raise unusable_values(plan.modules[first_unusable], self._dtype)

    def _compare_copies(self, file: int, plan: ReadPlan) -> None:
        """Raises ArtifactError for a whole matrix with rows that are not the base's."""
        for module, info in plan.copies:
            original = self._originals.get(module)
            changed = 0 if original is None else first_changed_row(file, info, original)
            if changed is not None:
                raise refusal("changed-copy", module=module, row=changed)

    def _plan(self, config: AdapterConfig, file: WeightsFile, max_rank: int) -> ReadPlan:
        header = file.header()
        shapes = {name: info.shape for name, info in header.tensors.items()}
        limits = AdapterLimits(max_rank, max_bytes=file.size_bytes)  # the size was checked before
        result = check_compatibility(AdapterFacts(config, shapes, file.size_bytes), self._base, limits)
        if not result.ok:
            raise ArtifactError(result.reason or FailureReason.INCOMPATIBLE, result.message)
        return plan_reading(
            self._groups,
            config,
            header.tensors,
            sort_tensors(header.tensors, self._base, config.target_parameters or ()),
            itemsize=self._element.itemsize,
            rank=result.rank,
            target_modules=result.target_modules,
        )


def base_facts(groups: Sequence[TargetGroup]) -> BaseFacts:
    """The facts about the loaded base that decide whether an adapter fits."""
    shapes = (shape for group in groups for shape in group.shapes())
    return BaseFacts.of(BaseModule(shape.module, shape.out_features, shape.in_features) for shape in shapes)


def unusable_values(module: str, dtype: str) -> ArtifactError:
    """The refusal of an adapter with a value in this module that is not finite or too large."""
    return ArtifactError(
        FailureReason.NON_FINITE_WEIGHTS,
        f"weights of {module} are not finite numbers below {TOO_LARGE:,.0f} in {dtype}: the training diverged, train "
        "it again with a lower learning rate",
    )


def _read_config(folder: Path) -> AdapterConfig:
    try:
        raw = (folder / ADAPTER_CONFIG).read_bytes()
    except OSError as error:
        raise ArtifactError(
            FailureReason.UNSUPPORTED_FORMAT,
            f"there is no readable {ADAPTER_CONFIG}: save the adapter with peft's save_pretrained",
        ) from error
    return parse_adapter_config(raw)


def _weights_of(folder: Path) -> Path:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        _refuse(
            FailureReason.UNSUPPORTED_FORMAT,
            "the weights are a pickle (adapter_model.bin), which is never read: save the adapter with safetensors"
            if pickled
            else f"there is no {ADAPTER_WEIGHTS}: save the adapter with peft's save_pretrained",
        )
    return path


def _refuse(reason: FailureReason, message: str) -> NoReturn:
    raise ArtifactError(reason, message)
