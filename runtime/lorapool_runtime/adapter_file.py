"""From a verified folder to an adapter laid out for its slot: every tensor accounted for, every number finite.

The server calls `read_adapter` in worker threads, hence NumPy and no torch. Whether the adapter fits is
`lorapool_artifacts.judge`'s verdict, as when the operator judged it, but on the layers of the loaded base. Refused
here, with the remedy in words: files that cannot be read and numbers that are not finite. It never unpickles and
never hands peft a folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import AdapterConfig, parse_adapter_config
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorapool_artifacts.judge import AdapterFacts, BaseFacts, judge, pair_of
from lorapool_artifacts.limits import JudgeLimits
from lorapool_runtime.interface import AdapterArtifactError
from lorapool_runtime.layout import Layout, lay_out
from lorapool_runtime.packing import pack, zeroed
from lorapool_runtime.safetensors_file import read_tensors
from lorapool_runtime.targets import TargetGroup


@dataclass(frozen=True, slots=True, eq=False)
class PackedAdapter:
    """`interface.HostAdapter`: one stretch of memory, laid out as its slot will be."""

    rank: int
    target_modules: tuple[str, ...]
    layout: Layout
    buffer: np.ndarray
    """[layout.elements]. bfloat16 is kept as its 16-bit patterns, which NumPy has no type for."""

    @property
    def host_bytes(self) -> int:
        return self.buffer.nbytes


def read_adapter(folder: Path, groups: Sequence[TargetGroup], *, dtype: str, max_rank: int) -> PackedAdapter:
    """dtype: float32, float16 or bfloat16. Raises AdapterArtifactError."""
    try:
        config, tensors = _read_config(folder), _read_weights(folder)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        size_bytes = sum(tensor.nbytes for tensor in tensors.values())
        limits = JudgeLimits(max_rank, max_bytes=size_bytes)  # how large a file may be was asked before it was read
        verdict = judge(AdapterFacts(config, shapes, size_bytes), base_facts(groups), limits)
    except ArtifactError as error:
        raise AdapterArtifactError(error.reason, error.message) from error
    if not verdict.ok:
        _refuse(verdict.reason or FailureReason.INCOMPATIBLE, verdict.message)
    pairs = _pairs(tensors)
    layout, buffer = _packed(groups, config, pairs, dtype)
    return PackedAdapter(rank=verdict.rank, target_modules=verdict.target_modules, layout=layout, buffer=buffer)


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


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        _refuse(
            FailureReason.UNSUPPORTED_FORMAT,
            "the weights are a pickle (adapter_model.bin), which is never read: save the adapter with safetensors"
            if pickled
            else f"there is no {ADAPTER_WEIGHTS}: save the adapter with peft's save_pretrained",
        )
    try:
        return read_tensors(path)
    except OSError as error:
        raise ArtifactError(
            FailureReason.CORRUPT_ARTIFACT, f"{ADAPTER_WEIGHTS} cannot be read ({error.strerror}); upload it again."
        ) from error


def _pairs(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """module -> (A, B), of tensors that were judged complete."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if pair := pair_of(name):
            sides.setdefault(pair[0], {})[pair[1]] = tensor
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _packed(
    groups: Sequence[TargetGroup], config: AdapterConfig, pairs: dict[str, tuple[np.ndarray, np.ndarray]], dtype: str
) -> tuple[Layout, np.ndarray]:
    """Every matrix at its place, B transposed and scaled; refuses what is not finite before or after."""
    modules = [module for group in groups for module in group.modules]
    ranks = tuple(config.rank_of(module) if module in pairs else 0 for module in modules)
    element = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    layout = lay_out(tuple(groups), ranks, element.itemsize)
    buffer = zeroed(layout.elements, element)
    for module, piece in zip(modules, layout.pieces, strict=True):
        if module not in pairs:
            continue
        a, b = pairs[module]
        finite = pack(a, piece.a(buffer), scale=1.0, transposed=False)
        if not (finite and pack(b, piece.b(buffer), scale=config.scaling_of(module), transposed=True)):
            _refuse(
                FailureReason.NON_FINITE_WEIGHTS,
                f"weights of {module} are not finite numbers in {dtype}: "
                "the training diverged, train it again with a lower learning rate",
            )
    return layout, buffer


def _refuse(reason: FailureReason, message: str) -> NoReturn:
    raise AdapterArtifactError(reason.value, message)
