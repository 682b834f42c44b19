"""The base's linear layers: several with the same input are fused into one product, and packed where the CPU allows it.

The native kernel (`base_step`) packs the weight where it supports it; else oneDNN does, in its blocked layout, where it
computes in the weight's own type; else the product is torch's. The engine's self-check compares the packed model with
the stock one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorapool_runtime.engines.torch.kernels.base_step import PanelLinear

_PACK_ROWS = 16  # the batch size that the blocked layout is chosen for: the rows of a decode step


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN packs and multiplies in this weight's type."""
    if weight.device.type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch declares no types here
        return False
    if weight.dtype == torch.float32:
        return True
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


class FusedLinear:
    """y = x W^T + b of several nn.Linear with the same input; their outputs are concatenated."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        self.out_features = tuple(linear.out_features for linear in linears)
        self.in_features = linears[0].in_features
        first = linears[0].weight
        self.dtype, self.device = first.dtype, first.device
        weight = first.detach() if len(linears) == 1 else torch.cat([linear.weight.detach() for linear in linears])
        bias = _joined_bias(linears)
        self.nbytes = weight.nbytes
        self.packed = True
        self.product: Callable[[Tensor], Tensor]
        if PanelLinear.serves(weight):
            panels = PanelLinear(weight, bias)
            self.nbytes = panels.nbytes
            self.product = panels
        elif can_pack(weight):
            # a copy: packing rewrites its argument, and a tied embedding still reads the original
            own = weight.clone() if len(linears) == 1 else weight
            self.product = _onednn(torch.ops.mkldnn._reorder_linear_weight(own, _PACK_ROWS), bias)
        else:
            self.packed = False
            self.product = _plain(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] -> [rows, out]"""
        return self.product(x)


def _onednn(packed: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


def _plain(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)


def _joined_bias(linears: list[nn.Linear]) -> Tensor | None:
    # nn.Linear declares its bias a Parameter; it is None without one
    biases: list[Tensor | None] = [linear.bias for linear in linears]
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features) if bias is None else bias.detach()
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )
