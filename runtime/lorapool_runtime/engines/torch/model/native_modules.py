"""Replaces the model's norms and gated MLPs by native modules that are verified to compute the same.

No module is matched by the name of an architecture. A module is replaced only if it has the right parts (`_norm_of`,
`_mlp_of`) and gives the same result for random inputs from tiny to huge, so that a module that clamps is not taken for
one that does not; all others stay. The engine's self-check compares the whole model afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorapool_runtime.engines.torch.kernels.base_step import RowGate, RowNorm
from lorapool_runtime.engines.torch.lora.layer import LoraGroup, LoraLinear

_MAGNITUDES = (0.0, 1e-2, 1.0, 2.0, 30.0, 1e3, -1.0, -1e3)
"""One row of the input for each: random numbers times so much; a row of a negative one has negative numbers only."""
_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
"""Relative to the largest result of the row: another order of summation, or one rounding in bfloat16. Other maths is
far above."""


class NativeNorm(nn.Module):
    def __init__(self, norm: RowNorm) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width] -> the same shape"""
        return self._norm(x)


class NativeMLP(nn.Module):
    """down(act(gate(x)) * up(x)), where gate and up are one product."""

    def __init__(self, both: LoraGroup, gate: RowGate, down: LoraLinear) -> None:
        super().__init__()
        self._both, self._gate, self.down = both, gate, down

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]"""
        rows = self._both.all_outputs(x.reshape(-1, x.shape[-1]))
        down: Tensor = self.down(self._gate(rows))
        return down.view(*x.shape[:-1], -1)


def replace_with_native(model: nn.Module) -> int:
    """Replaces the modules that a native one equals, and returns their number. LoRA layers must be in place."""
    replacements: list[tuple[str, nn.Module]] = []
    with torch.no_grad():
        for name, module in model.named_modules():
            native = _norm_of(module) or _mlp_of(module)
            if native is not None:
                replacements.append((name, native))
    for name, replacement in replacements:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, replacement)
    return len(replacements)


def _norm_of(module: nn.Module) -> NativeNorm | None:
    """The native form of an RMS norm: a module of one vector and an epsilon."""
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
    """The native form of a gated MLP: a fused pair of linear layers, one more, and an activation without parameters."""
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
    """[1, len(_MAGNITUDES), width]"""
    rows = torch.randn(len(_MAGNITUDES), width, generator=torch.Generator().manual_seed(width))
    scaled = [row * scale if scale >= 0 else row.abs() * scale for row, scale in zip(rows, _MAGNITUDES, strict=True)]
    return torch.stack(scaled)[None].to(dtype)


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether both have the same shape and type, and in each row values within the tolerance."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    off = (ours.float() - theirs.float()).abs().amax(-1)
    return bool((off <= _TOLERANCE[theirs.dtype] * theirs.float().abs().amax(-1)).all())
