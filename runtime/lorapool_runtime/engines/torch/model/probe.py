"""Runs the stock model once on a short prompt, to find the modules that adapters may change.

No architecture is recognized by its name: what is called, how often and with which input decides. The model may be on
the meta device, where nothing is computed and the calls are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorapool_api.base_modules import BaseModule, ModuleKind
from lorapool_runtime.engines.torch.model.key_map import KeyMap, text_prefix

PROBE_TOKENS = 12


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The logits of the stock model for a fixed prompt, to compare the modified model with."""

    token_ids: tuple[int, ...]
    logits: Tensor  # [tokens, vocabulary]


@dataclass(frozen=True, slots=True)
class LinearCall:
    linear: nn.Linear
    x: Tensor  # referenced, so that the same object means the same input


@dataclass(slots=True)
class Calls:
    """What the probe called, in order."""

    linears: list[LinearCall] = field(default_factory=list)
    experts: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    """Modules with the parameters of several experts, and the rows they were called with."""
    products: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Weights that `F.linear` was called with, and the rows."""


@dataclass(frozen=True, slots=True)
class Adaptable:
    """What adapters may change in a model."""

    groups: tuple[tuple[nn.Linear, ...], ...]
    """Linear layers of one parent that are called in sequence with the same input."""
    output: nn.Linear | None
    embedding: nn.Embedding | None
    experts: tuple[nn.Module, ...]
    parameters: tuple[nn.Module, ...]
    """Modules that multiply with a parameter `weight` by their own code."""
    modules: tuple[BaseModule, ...]
    """All of these, and those that no text passes, with all their names."""


def run_probe(model: Any, device: torch.device) -> tuple[ProbeResult, Calls]:
    vocab = int(model.get_input_embeddings().weight.shape[0])
    ids = tuple((7 + 13 * i) % vocab for i in range(PROBE_TOKENS))
    calls = Calls()
    with _recording(model, calls):
        out = model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return ProbeResult(ids, out.logits[0].float()), calls


@contextmanager
def _recording(model: nn.Module, calls: Calls) -> Iterator[None]:
    def linear(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, nn.Linear)
        calls.linears.append(LinearCall(module, args[0]))

    def experts(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            calls.experts.append((module, args[0]))

    handles = [m.register_forward_pre_hook(linear) for m in model.modules() if isinstance(m, nn.Linear)]
    handles += [m.register_forward_pre_hook(experts) for m in model.modules() if holds_experts(m)]
    try:
        with _Products(calls):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchFunctionMode):
    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self._calls = calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and len(args) > 1:
            self._calls.products.append((args[1], args[0]))
        return func(*args, **(kwargs or {}))


def holds_experts(module: Any) -> bool:
    """Whether the module has the two parameters of gated experts, in the form that `LoraExperts` computes."""
    parameters = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    form = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    return (
        parameters == {"gate_up_proj": 3, "down_proj": 3}
        and all(getattr(module, name, None) is wanted for name, wanted in form.items())
        and not getattr(module, "has_post_expert_norm", False)
        and hasattr(module, "_apply_gate")
    )


def adaptable(model: Any, calls: Calls, key_map: KeyMap) -> Adaptable:
    """Finds what adapters may change. The key map gives each module its names."""
    names = {module: name for name, module in model.named_modules()}
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    groups = _grouped(calls.linears, names, output)
    experts = tuple(
        module
        for module, rows in calls.experts
        if rows.dim() == 2 and len(rows) == PROBE_TOKENS and sum(other is module for other, _ in calls.experts) == 1
    )
    parameters = tuple(module for module in names if _multiplies(module, calls, (output, embedding)))
    served_output = output if type(output) is nn.Linear else None
    served_embedding = embedding if isinstance(embedding, nn.Embedding) and embedding in names else None
    modules = [_linear(linear, names[linear], ModuleKind.LINEAR, key_map) for group in groups for linear in group]
    if served_output is not None:
        modules.append(_linear(served_output, names[served_output], ModuleKind.OUTPUT, key_map))
    if served_embedding is not None:
        tokens, width = served_embedding.weight.shape
        modules.append(_module(names[served_embedding], width, tokens, ModuleKind.EMBEDDING, key_map))
    modules += [_parameter(module, names[module], key_map) for module in parameters]
    modules += [module for holder in experts for module in _of_experts(holder, names[holder], key_map)]
    modules += _unused(model, calls, key_map)
    return Adaptable(tuple(map(tuple, groups)), served_output, served_embedding, experts, parameters, tuple(modules))


def _multiplies(module: nn.Module, calls: Calls, excluded: tuple[nn.Module | None, ...]) -> bool:
    """Whether the module's own code multiplies each token's row once with its parameter `weight`."""
    weights = dict(module.named_parameters(recurse=False))
    weight = weights.get("weight")
    if isinstance(module, nn.Linear) or module in excluded or weight is None or weights.keys() != {"weight"}:
        return False
    rows = [x for used, x in calls.products if used is weight]
    return len(rows) == 1 and rows[0].shape[:-1].numel() == PROBE_TOKENS


def _parameter(module: nn.Module, name: str, key_map: KeyMap) -> BaseModule:
    out_features, in_features = dict(module.named_parameters())["weight"].shape
    return _module(name, out_features, in_features, ModuleKind.PARAMETER, key_map)


def _linear(linear: nn.Linear, name: str, kind: ModuleKind, key_map: KeyMap) -> BaseModule:
    return _module(name, linear.out_features, linear.in_features, kind, key_map)


def _module(name: str, out_features: int, in_features: int, kind: ModuleKind, key_map: KeyMap) -> BaseModule:
    aliases = (alias.removesuffix(".weight") for alias in key_map.spellings(f"{name}.weight"))
    return BaseModule(name, out_features, in_features, kind, aliases=tuple(aliases))


def _of_experts(holder: nn.Module, name: str, key_map: KeyMap) -> Iterator[BaseModule]:
    for leaf, parameter in holder.named_parameters(recurse=False):
        experts, out_features, in_features = parameter.shape
        key = f"{name}.{leaf}"
        yield BaseModule(
            key,
            out_features,
            in_features,
            ModuleKind.EXPERTS,
            experts,
            key_map.expert_parts.get(leaf, ()),
            key_map.spellings(key),
        )


def _unused(model: Any, calls: Calls, key_map: KeyMap) -> list[BaseModule]:
    """The linear layers outside of the text model of a multimodal one."""
    text, called = text_prefix(model), {call.linear for call in calls.linears}
    return [
        _linear(module, name, ModuleKind.UNUSED, key_map)
        for name, module in model.named_modules()
        if text and isinstance(module, nn.Linear) and module not in called and not name.startswith(text)
    ]


def _grouped(
    calls: Sequence[LinearCall], names: dict[nn.Module, str], output: nn.Module | None
) -> list[list[nn.Linear]]:
    """Groups the linear layers of one parent that were called in sequence with the same input, one row per token."""
    counts: dict[nn.Linear, int] = {}
    for call in calls:
        counts[call.linear] = counts.get(call.linear, 0) + 1
    groups: list[list[nn.Linear]] = []
    last: LinearCall | None = None
    for call in calls:
        one_row_per_token = call.x.shape[:-1].numel() == PROBE_TOKENS
        if (
            call.linear is output
            or counts[call.linear] != 1
            or not one_row_per_token
            or type(call.linear) is not nn.Linear
        ):
            last = None
            continue
        if last is not None and call.x is last.x and parent_name(names[call.linear]) == parent_name(names[last.linear]):
            groups[-1].append(call.linear)
        else:
            groups.append([call.linear])
        last = call
    return groups


def parent_name(name: str) -> str:
    return name.rpartition(".")[0]
