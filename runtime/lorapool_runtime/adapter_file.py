"""From a verified folder to an adapter laid out for its slot: every tensor accounted for, every number finite.

The server calls `read_adapter` in worker threads, hence NumPy and no torch. It refuses, with the remedy in words,
whatever cannot become exactly what peft computes: other kinds of adapters, wrong shapes, tensors too few or too
many, a rank above the base's limit. It never unpickles and never hands peft a folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from lorapool_api.common import FailureReason
from lorapool_artifacts.adapter_config import AdapterConfig, parse_adapter_config
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from lorapool_runtime.interface import AdapterArtifactError
from lorapool_runtime.layout import Layout, lay_out
from lorapool_runtime.safetensors_file import read_tensors
from lorapool_runtime.targets import TargetGroup

_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_SHOWN = 3  # mismatches named in a message


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
    except ArtifactError as error:
        raise AdapterArtifactError(error.reason, error.message) from error
    pairs = _pairs(tensors)
    _check_against_base(config, pairs, groups)
    shapes = {shape.module: shape for group in groups for shape in group.shapes()}
    for module, (a, b) in pairs.items():
        rank = config.rank_of(module)
        if rank > max_rank:
            _refuse(
                FailureReason.RANK_TOO_HIGH,
                f"the adapter has rank {rank} on {module}; this base takes at most {max_rank}: "
                f"train it with r <= {max_rank} or raise the base's lora.maxRank",
            )
        wanted = ((rank, shapes[module].in_features), (shapes[module].out_features, rank))
        if (a.shape, b.shape) != wanted:
            _refuse(
                FailureReason.INCOMPATIBLE,
                f"{module} has shapes A {list(a.shape)} and B {list(b.shape)}, "
                f"this base needs A {list(wanted[0])} and B {list(wanted[1])}: it was trained on another base",
            )
    layout, buffer = _packed(groups, config, pairs, dtype)
    return PackedAdapter(
        rank=layout.rank,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        layout=layout,
        buffer=buffer,
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
    """module -> (A, B); refuses whatever is not one of the two."""
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is None:
            _refuse_tensor(name)
        if tensor.ndim != 2:
            _refuse(FailureReason.INCOMPATIBLE, f"{name} has {tensor.ndim} dimensions, a LoRA matrix has 2")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    halves = [f"{module}.lora_{'B' if 'A' in found else 'A'}" for module, found in sides.items() if len(found) < 2]
    if halves:
        _refuse(FailureReason.CORRUPT_ARTIFACT, f"tensors are missing: {_listed(halves)}; save the adapter again")
    return {module: (found["A"], found["B"]) for module, found in sides.items()}


def _refuse_tensor(name: str) -> NoReturn:
    kinds = (
        ("lora_magnitude_vector", "a DoRA magnitude; DoRA is not supported: train it again with use_dora=False"),
        ("lora_embedding_", "a trained embedding; train it again without embed_tokens among target_modules"),
        ("lora_B.bias", "a trained bias; train it again with lora_bias=False"),
        (
            "embed_tokens",
            "a saved embedding; it cannot differ per adapter: save with save_embedding_layers=False",
        ),
        ("lm_head", "a saved output layer; it cannot differ per adapter: train without lm_head"),
        ("modules_to_save", "a whole saved module; train it again without modules_to_save"),
    )
    for part, sentence in kinds:
        if part in name:
            _refuse(FailureReason.INCOMPATIBLE, f"{name} is {sentence}")
    _refuse(FailureReason.INCOMPATIBLE, f"{name} is no LoRA weight: save the adapter with peft's save_pretrained")


def _check_against_base(
    config: AdapterConfig, pairs: dict[str, tuple[np.ndarray, np.ndarray]], groups: Sequence[TargetGroup]
) -> None:
    """The file must hold exactly the modules of this base that the config targets.

    Where a regular expression names them, those the file holds: to peft a module without weights is one unchanged.
    """
    modules = {module for group in groups for module in group.modules}
    unknown = sorted(pairs.keys() - modules)
    if unknown:
        _refuse(
            FailureReason.INCOMPATIBLE,
            f"the adapter changes {_listed(unknown)}, which this base does not have or does not let adapters change: "
            "train it on this base, on its attention and MLP layers",
        )
    missing = sorted(module for module in modules - pairs.keys() if config.targets(module))
    extra = sorted(module for module in pairs if config.targets(module) is False)
    if missing:
        _refuse(
            FailureReason.CORRUPT_ARTIFACT,
            f"target_modules names layers the file has no weights for: {_listed(missing)}; save the adapter again",
        )
    if extra:
        _refuse(
            FailureReason.CORRUPT_ARTIFACT,
            f"the file has weights that target_modules does not name: {_listed(extra)}; save the adapter again",
        )
    if isinstance(config.target_modules, list):
        unmatched = sorted(
            name for name in config.target_modules if not any(m == name or m.endswith(f".{name}") for m in pairs)
        )
        if unmatched:
            _refuse(
                FailureReason.INCOMPATIBLE,
                f"target_modules names {_listed(unmatched)}, but no weights came with it for a layer of this base: "
                "train it on this base",
            )


def _packed(
    groups: Sequence[TargetGroup], config: AdapterConfig, pairs: dict[str, tuple[np.ndarray, np.ndarray]], dtype: str
) -> tuple[Layout, np.ndarray]:
    """Every matrix at its place, B transposed and scaled; refuses what is not finite before or after."""
    modules = [module for group in groups for module in group.modules]
    ranks = tuple(config.rank_of(module) if module in pairs else 0 for module in modules)
    element = np.dtype(np.uint16 if dtype == "bfloat16" else dtype)
    layout = lay_out(tuple(groups), ranks, element.itemsize)
    buffer = np.zeros(layout.elements, element)
    for module, piece in zip(modules, layout.pieces, strict=True):
        if module not in pairs:
            continue
        a, b = pairs[module]
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.multiply(b.T, np.float32(config.scaling_of(module)), dtype=np.float32)
        if not (_cast(a, piece.a(buffer), dtype) and _cast(scaled, piece.b(buffer), dtype)):
            _refuse(
                FailureReason.NON_FINITE_WEIGHTS,
                f"weights of {module} are not finite numbers in {dtype}: "
                "the training diverged, train it again with a lower learning rate",
            )
    return layout, buffer


def _cast(values: np.ndarray, to: np.ndarray, dtype: str) -> bool:
    """To the engine's type, rounded to nearest even; whether all are finite before and after."""
    if dtype == "bfloat16":
        bits = values.view(np.uint32)
        to[:] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bool(np.isfinite(values).all() and ((to & 0x7F80) != 0x7F80).all())
    with np.errstate(over="ignore"):
        to[:] = values
    return bool(np.isfinite(to).all())


def _listed(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _refuse(reason: FailureReason, message: str) -> NoReturn:
    raise AdapterArtifactError(reason.value, message)
