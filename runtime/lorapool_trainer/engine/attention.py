"""Causal attention of a packed row: each sequence attends to itself alone, in the shapes it would have by itself.

The arithmetic is that of transformers' `sdpa` attention, and of its `eager` attention where logits are capped, which
`sdpa` refuses; so a sequence gives the same bits as in the stock model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lorapool_runtime.engines.torch.model.attention import LayerAttention


class PackedAttention:
    """lengths: of the sequences; rows behind them are padding and give zeros."""

    def __init__(self, lengths: Sequence[int], rows: int) -> None:
        self._sequences = len(lengths)
        padding = rows - sum(lengths)
        self._pieces = [*lengths, padding] if padding else list(lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """q: [1, heads, rows, head_dim]; k, v: [1, kv_heads, rows, head_dim] -> [1, rows, heads, head_dim]."""
        split = [torch.split(each, self._pieces, dim=2) for each in (q, k, v)]
        pieces: list[tuple[Tensor, Tensor, Tensor]] = list(zip(*split, strict=True))
        outputs = [_attend(*piece, scale, wants) for piece in pieces[: self._sequences]]
        outputs += [torch.zeros_like(queries).transpose(1, 2) for queries, _, _ in pieces[self._sequences :]]
        return torch.cat(outputs, dim=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
    """One sequence. q: [1, heads, n, head_dim] -> [1, n, heads, head_dim]."""
    if wants.softcap is not None:
        return _capped(q, k, v, scale, wants.softcap, wants.window)
    groups = q.shape[1] // k.shape[1]
    mask = _window_mask(q.shape[2], wants.window, q.device)
    if mask is not None:
        k, v = _repeated(k, groups), _repeated(v, groups)
    grouped = mask is None and groups > 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def _capped(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, window: int | None) -> Tensor:
    groups, n = q.shape[1] // k.shape[1], q.shape[2]
    scores = torch.matmul(q, _repeated(k, groups).transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    visible = _visible(n, window, q.device)
    mask = torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill_(~visible, torch.finfo(q.dtype).min)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, _repeated(v, groups)).transpose(1, 2)


def _window_mask(n: int, window: int | None, device: torch.device) -> Tensor | None:
    """None where the window is longer than the sequence: the kernel then applies causality itself."""
    return None if window is None or n < window else _visible(n, window, device)[None, None]


def _visible(n: int, window: int | None, device: torch.device) -> Tensor:
    """[n, n]: whether the query of a row may attend to the key of a column."""
    visible = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return visible if window is None else visible.triu(1 - window)


def _repeated(heads: Tensor, groups: int) -> Tensor:
    """[1, kv_heads, n, head_dim] -> [1, heads, n, head_dim]: each key head once for every query head that shares it."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)
