"""From a verified folder to an adapter laid out for its slot: every tensor accounted for, every number finite.

The engine owns one `AdapterReader` for its base and calls it in worker threads, hence no torch. Whether an adapter
fits is decided by `lorapool_artifacts.compatibility`, as in the operator, but with the layers of the loaded base.
Refused here, with the remedy in words: files that cannot be read and numbers that are not finite. It never unpickles
and never hands peft a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import AdapterConfig, parse_adapter_config
from lorapool_artifacts.compatibility import AdapterFacts, BaseFacts, check_compatibility
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorapool_artifacts.settings import AdapterLimits
from lorapool_runtime.engines.interface import AdapterArtifactError
from lorapool_runtime.weights.layout import Layout
from lorapool_runtime.weights.pack import ALONE, Pace, pack_file, zeroed
from lorapool_runtime.weights.read_plan import Plans, ReadPlan, plan_reading
from lorapool_runtime.weights.safetensors_file import WeightsFile, open_weights
from lorapool_runtime.weights.targets import TargetGroup


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedAdapter:
    """`interface.HostAdapter`: one stretch of memory, laid out as its slot will be; nobody changes it once it is read.

    The host cache and, where it is loaded on CPU, its slot hold it: it can be watched to see when the last lets go."""

    rank: int
    target_modules: tuple[str, ...]
    layout: Layout
    buffer: np.ndarray
    """[layout.elements]. bfloat16 is kept as its 16-bit patterns, which NumPy has no type for."""

    @property
    def host_bytes(self) -> int:
        return self.buffer.nbytes


class AdapterReader:
    """Reads adapters for one base. dtype: float32, float16 or bfloat16, what the base computes in."""

    def __init__(self, groups: Sequence[TargetGroup], dtype: str) -> None:
        self._groups = tuple(groups)
        self._dtype = dtype
        self._element = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
        self._base = base_facts(groups)
        self._plans = Plans()

    def read(self, folder: Path, *, max_rank: int, pace: Pace = ALONE) -> PackedAdapter:
        """Blocks. Raises AdapterArtifactError."""
        try:
            config = _read_config(folder)
            with open_weights(_weights_of(folder)) as file:
                plan = self._plans.get(
                    (hashlib.sha256(file.head).digest(), file.size_bytes, config.meaning(), max_rank),
                    lambda: self._plan(config, file, max_rank),
                )
                buffer = zeroed(plan.layout.elements, self._element)
                sick = pack_file(file.descriptor, buffer, plan.matrices, plan.scales, pace)
        except ArtifactError as error:
            raise AdapterArtifactError(error.reason, error.message) from error
        except (OSError, EOFError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            _refuse(FailureReason.CORRUPT_ARTIFACT, f"{ADAPTER_WEIGHTS} cannot be read ({why}); upload it again.")
        if sick is not None:
            _refuse(
                FailureReason.NON_FINITE_WEIGHTS,
                f"weights of {plan.modules[sick]} are not finite numbers in {self._dtype}: "
                "the training diverged, train it again with a lower learning rate",
            )
        return PackedAdapter(plan.rank, plan.target_modules, plan.layout, buffer)

    def _plan(self, config: AdapterConfig, file: WeightsFile, max_rank: int) -> ReadPlan:
        header = file.header()
        shapes = {name: info.shape for name, info in header.tensors.items()}
        limits = AdapterLimits(max_rank, max_bytes=file.size_bytes)  # how large it may be was asked before it was read
        result = check_compatibility(AdapterFacts(config, shapes, file.size_bytes), self._base, limits)
        if not result.ok:
            raise ArtifactError(result.reason or FailureReason.INCOMPATIBLE, result.message)
        return plan_reading(
            self._groups,
            config,
            header.tensors,
            itemsize=self._element.itemsize,
            target_modules=result.target_modules,
        )


def base_facts(groups: Sequence[TargetGroup]) -> BaseFacts:
    """The loaded base, as far as adapters are concerned."""
    shapes = (shape for group in groups for shape in group.shapes())
    return BaseFacts({shape.module: (shape.out_features, shape.in_features) for shape in shapes}, loaded=True)


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
    raise AdapterArtifactError(reason.value, message)
