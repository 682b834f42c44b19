"""Puts LoRA into a model: replaces what adapters may change by layers that add the adapters of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_runtime.engines.torch.kernels.fused_linear import FusedLinear
from lorapool_runtime.engines.torch.lora.experts import LoraExperts
from lorapool_runtime.engines.torch.lora.layer import LoraBatch, LoraEmbedding, LoraGroup, LoraLinear
from lorapool_runtime.engines.torch.lora.parameter import replace_parameter
from lorapool_runtime.engines.torch.model.probe import Adaptable, parent_name
from lorapool_runtime.host_memory import return_free_memory
from lorapool_runtime.weights.targets import TargetGroup


def fit_lora(model: Any, found: Adaptable, lora: LoraBatch) -> tuple[tuple[TargetGroup, ...], int]:
    """Replaces the modules in place.

    Returns the groups, those of linear layers first, and the bytes of weights that are no longer parameters.
    """
    names = {module: name for name, module in model.named_modules()}
    tied = found.output is not None and found.output.weight is model.get_input_embeddings().weight
    groups: list[TargetGroup] = []
    fused_bytes = 0
    for linears in found.groups:
        base = _replace_linears(model, list(linears), names, groups, lora, ModuleKind.LINEAR)
        fused_bytes += base.nbytes
    if found.output is not None:
        lora.output_group = len(groups)
        base = _replace_linears(model, [found.output], names, groups, lora, ModuleKind.OUTPUT)
        fused_bytes += base.nbytes if base.packed or not tied else 0
    if found.embedding is not None:
        name, (tokens, width) = names[found.embedding], found.embedding.weight.shape
        _replace(model, name, LoraEmbedding(found.embedding, len(groups), lora))
        groups.append(TargetGroup((name,), tokens, (width,), ModuleKind.EMBEDDING))
    for module in found.parameters:
        out_features, in_features = dict(module.named_parameters())["weight"].shape
        fused_bytes += replace_parameter(module, len(groups), lora)
        groups.append(TargetGroup((names[module],), in_features, (out_features,), ModuleKind.PARAMETER))
    for holder in found.experts:
        pair = tuple(_experts_group(module) for module in _parameters_of(names[holder], found.modules))
        LoraExperts(holder, tuple(enumerate(pair, len(groups))), lora)
        groups += pair
    return tuple(groups), fused_bytes


def _replace_linears(
    model: nn.Module,
    linears: list[nn.Linear],
    names: dict[nn.Module, str],
    groups: list[TargetGroup],
    lora: LoraBatch,
    kind: ModuleKind,
) -> FusedLinear:
    base = FusedLinear(linears)
    for linear in linears:  # what was fused is freed before the next group is; an embedding keeps the weight it shares
        linear.register_parameter("weight", None)
        linear.register_parameter("bias", None)
    if base.device.type == "cuda":
        torch.cuda.empty_cache()  # the freed weights are smaller than the next fused one: it could not use their memory
    else:
        return_free_memory()
    target = TargetGroup(tuple(names[linear] for linear in linears), base.in_features, base.out_features, kind)
    group = LoraGroup(len(groups), target, base, lora)
    for member, name in enumerate(target.modules):
        _replace(model, name, LoraLinear(group, member))
    groups.append(target)
    return base


def _parameters_of(holder: str, modules: tuple[BaseModule, ...]) -> Iterator[BaseModule]:
    """Those of gate and up first, then those of down."""
    for leaf in ("gate_up_proj", "down_proj"):
        yield next(module for module in modules if module.name == f"{holder}.{leaf}")


def _experts_group(module: BaseModule) -> TargetGroup:
    """A member for the whole parameter and, where it joins several matrices, one for each."""
    holder, parts = parent_name(module.name), module.parts if len(module.parts) > 1 else ()
    return TargetGroup(
        (module.name, *(f"{holder}.{part}" for part in parts)),
        module.in_features,
        (module.out_features, *(module.out_features // len(parts) for _ in parts)),
        ModuleKind.EXPERTS,
        module.experts,
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    setattr(model.get_submodule(parent_name(name)), name.rpartition(".")[2], module)
