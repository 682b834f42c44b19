"""Replaces the model's norms and gated products by native ones, where each is proved to compute the same.

`model` calls it once, after the linear layers are in place. Nothing is matched by an architecture's name: a module is
replaced only if it has the parts of one (`_norm_of`, `_mlp_of`) and answers a random input as the native form does;
every other stays as it is. The engine's self-check compares the whole model afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.torch.kernels.base_step import RowGate, RowNorm
from lorapool_runtime.engines.torch.lora.layer import LoraGroup, LoraLinear

_ROWS = 5
_CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""Of the largest answer: summed in another order, in bfloat16 one rounding apart; other maths is far above."""


class NativeNorm(nn.Module):
    def __init__(self, norm: RowNorm) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same"""
        return self._norm(x)


class NativeMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up being one product."""

    def __init__(self, both: LoraGroup, gate: RowGate, down: LoraLinear) -> None:
        super().__init__()
        self._both, self._gate, self.down = both, gate, down

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]"""
        rows = self._both.all_outputs(x.reshape(-1, x.shape[-1]))
        down: Tensor = self.down(self._gate(rows))
        return down.view(*x.shape[:-1], -1)


def fit_between(model: nn.Module) -> int:
    """Replaces what can be proved equal; how many modules that were."""
    fitted: list[tuple[str, nn.Module]] = []
    with torch.no_grad():
        for name, module in model.named_modules():
            native = _norm_of(module) or _mlp_of(module)
            if native is not None:
                fitted.append((name, native))
    for name, replacement in fitted:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)
    return len(fitted)


def _norm_of(module: nn.Module) -> NativeNorm | None:
    """A module of one vector and an epsilon, if it divides by the root mean square."""
    parameters = dict(module.named_parameters())
    epsilon = next((v for n in ("variance_epsilon", "eps") if isinstance(v := getattr(module, n, None), float)), None)
    if parameters.keys() != {"weight"} or any(module.children()) or epsilon is None:
        return None
    weight = parameters["weight"]
    if weight.dim() != 1 or not RowNorm.serves(weight):
        return None
    x = _random(weight.shape[0], weight.dtype)
    want = module(x)
    for plus_one in (False, True):
        for round_first in (True, False):
            norm = RowNorm(weight, epsilon, plus_one=plus_one, round_first=round_first)
            if _equal(norm(x), want):
                return NativeNorm(norm)
    return None


def _mlp_of(module: Any) -> NativeMLP | None:
    """A module of one fused pair of linear layers, one more, and an activation without parameters."""
    linears = [child for child in module.children() if isinstance(child, LoraLinear)]
    others = [child for child in module.children() if not isinstance(child, LoraLinear)]
    if len(linears) != 3 or len(others) != 1 or any(others[0].parameters()) or any(others[0].children()):
        return None
    pairs = {child.group.number: child.group for child in linears if child.group.target.size == 2}
    down = next((child for child in linears if child.group.target.size == 1), None)
    if len(pairs) != 1 or down is None:
        return None
    both = next(iter(pairs.values()))
    width, (first, second) = both.base.out_features[0], both.base.out_features
    dtype, device = both.base.dtype, both.base.device
    if first != second or down.group.base.in_features != width or not RowGate.serves(dtype, device):
        return None
    x = _random(both.base.in_features, dtype)
    want = module(x)
    for activation in RowGate.ACTIVATIONS:
        native = NativeMLP(both, RowGate(width, dtype, activation), down)
        if _equal(native(x), want):
            return native
    return None


def _random(width: int, dtype: torch.dtype) -> Tensor:
    """[1, _ROWS, width]"""
    return (torch.randn(1, _ROWS, width, generator=torch.Generator().manual_seed(width)) * 2).to(dtype)


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    off = float((ours.float() - theirs.float()).abs().max())
    return off <= _CLOSE[theirs.dtype] * float(theirs.float().abs().max())
