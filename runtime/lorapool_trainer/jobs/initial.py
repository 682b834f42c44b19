"""An adapter whose training is continued: what it is, read from its files, and the settings that follow from it.

Rank, alpha and the changed layers are the adapter's own. So are its chat template and tokens, which go into the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lorapool_api.tuning.finetunejob import ALL_LINEAR, LoraSettings
from lorapool_artifacts.checks.adapter_config import AdapterConfig, read_adapter_config
from lorapool_artifacts.errors import ArtifactError
from lorapool_artifacts.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHAT_FILES
from lorapool_trainer.engine import JobSettings
from lorapool_trainer.jobs.order import JobOrder, engine_settings, named_targets

_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")


class InitialAdapterError(ValueError):
    """The adapter of `initFrom` cannot be continued; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class InitialAdapter:
    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Full names of the changed layers, sorted."""
    tensors: Mapping[str, Tensor]
    """By their names in peft's file."""
    chat_files: Mapping[str, bytes]
    """Template, tokenizer and generation config that it brings, by file name."""


def read_initial(folder: Path) -> InitialAdapter:
    """Reads an adapter's folder, as peft saves it. Blocks. Raises InitialAdapterError and OSError."""
    config = _config(folder)
    try:
        tensors = safetensors.torch.load_file(folder / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise InitialAdapterError(f"{ADAPTER_WEIGHTS} of the adapter to continue is damaged: {error}") from error
    modules = tuple(sorted({_module(name) for name in tensors}))
    shapes = {(config.rank_of(module), config.scaling_of(module)) for module in modules}
    if len(shapes) != 1:
        raise InitialAdapterError(
            "the adapter to continue has several ranks or scales (rank_pattern, alpha_pattern), and only one of each "
            "can be trained; begin with the base instead"
        )
    ((rank, scale),) = shapes
    present = {name: folder / name for name in CHAT_FILES if (folder / name).is_file()}
    chat_files = {name: path.read_bytes() for name, path in present.items()}
    return InitialAdapter(rank, scale * rank, modules, tensors, chat_files)


def _config(folder: Path) -> AdapterConfig:
    try:
        config, problems = read_adapter_config((folder / ADAPTER_CONFIG).read_bytes())
    except ArtifactError as error:
        raise _refused(error) from error
    if problems:
        raise _refused(problems[0])
    assert config is not None, "without problems there is a config"
    return config


def _refused(error: ArtifactError) -> InitialAdapterError:
    return InitialAdapterError(f"the adapter to continue is refused: {error.message.removesuffix('.')}")


def _module(name: str) -> str:
    found = _MATRIX.fullmatch(name)
    if found is None:
        raise InitialAdapterError(
            f"the adapter to continue has the tensor {name}, and only A and B of linear layers can be trained; "
            "begin with the base instead"
        )
    return found[1]


def continued_settings(
    order: JobOrder, initial: InitialAdapter, targets: Callable[[JobSettings], tuple[str, ...]]
) -> JobSettings:
    """The job's settings with the adapter's rank, alpha and layers. `targets` finds the layers of settings.

    Raises InitialAdapterError where `lora` asks for others, and what `targets` and `engine_settings` raise.
    """
    asked = order.lora
    for name, given, own in (("rank", asked.rank, initial.rank), ("alpha", asked.alpha, initial.alpha)):
        if given is not None and given != own:
            raise _conflict(name, f"{given}", f"{own:g}")
    plain = engine_settings(replace(order, lora=asked.model_copy(update={"rank": initial.rank})))
    settings = replace(plain, alpha=initial.alpha, target_modules=initial.modules)
    if _names_layers(asked) and set(targets(plain)) != set(targets(settings)):
        names = ", ".join(sorted({module.rpartition(".")[2] for module in initial.modules}))
        raise _conflict("targetModules", ", ".join(asked.target_modules), f"{len(initial.modules)} layers {names}")
    return settings


def _names_layers(lora: LoraSettings) -> bool:
    """all-linear is the default, and so no wish."""
    return named_targets(lora) != ALL_LINEAR


def _conflict(name: str, given: str, own: str) -> InitialAdapterError:
    return InitialAdapterError(
        f"spec.lora.{name} is {given}, but the adapter of spec.initFrom has {own}; leave spec.lora.{name} out"
    )
