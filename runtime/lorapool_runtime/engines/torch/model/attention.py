"""Attention of a mixed batch over the paged keys and values of each request.

transformers calls it in place of its own attention, for every layer. Grouped queries, sliding windows and logit soft
caps are computed; `load` refuses architectures that need more (sinks, biases). The runner makes one batch per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lorapool_runtime.engines.errors import UnsupportedBaseError
from lorapool_runtime.engines.torch.kernels.base_step import PagedDecode
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.scheduling.blocks import NULL_BLOCK
from lorapool_runtime.engines.torch.scheduling.scheduler import Chunk, StepPlan
from lorapool_runtime.engines.torch.transfers import to_device


class UnsupportedAttentionError(UnsupportedBaseError):
    """The base needs a kind of attention that this engine does not compute."""


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention parameters of one layer, as observed by the probe."""

    kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None


class Attention(Protocol):
    """Computes the attention of a layer: over a paged batch, or for the probe that inspects the model."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """q: [1, heads, tokens, head_dim]; k, v: [1, kv_heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
        ...


class ProbeAttention:
    """Causal attention of one new sequence that records the parameters of every layer."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerAttention] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        if layer in self.layers:
            raise UnsupportedAttentionError(f"two attention modules have the index {layer}")
        if v.shape != k.shape:
            raise UnsupportedAttentionError(f"layer {layer} has keys {tuple(k.shape)} but values {tuple(v.shape)}")
        self.layers[layer] = wants
        return _prefill(q, k, v, 0, scale, wants).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class _PrefillRows:
    """A prefill chunk: rows [begin, end) of the batch, which are the sequence's tokens from position `start` on."""

    begin: int
    end: int
    start: int
    blocks: Tensor  # [n], of the whole sequence up to the end of the chunk


class PagedAttention:
    """The attention of one step: all decoding rows at once, then each prefill chunk separately."""

    def __init__(self, pool: KVPool, plan: StepPlan) -> None:
        self.pool = pool
        device, size = pool.data.device, pool.block_size
        positions = [p for chunk in plan.chunks for p in _flat_positions(chunk, size)]
        self.positions = to_device(positions, torch.int64, device)  # [tokens]
        self.decoding = len(plan.decodes)
        self._decoder = self._decoder_of(plan) if plan.decodes else None
        self.prefills: list[_PrefillRows] = []
        begin = self.decoding
        for chunk in plan.prefills:
            end = begin + chunk.num_tokens
            held = chunk.sequence.block_table[: -(-(chunk.start + chunk.num_tokens) // size)]
            self.prefills.append(_PrefillRows(begin, end, chunk.start, to_device(held, torch.int64, device)))
            begin = end

    @staticmethod
    def reads_whole_blocks(pool: KVPool) -> bool:
        """Whether a decoding row reads its blocks beyond its own tokens, masked, so that they must hold finite values.

        The kernels of a GPU read nothing beyond a row's tokens, and a prompt's gathered blocks are cut to them.
        """
        return pool.data.device.type != "cuda"

    def _decoder_of(self, plan: StepPlan) -> _NativeDecode | TorchRows | TritonRows:
        """The implementation for the decoding rows, with one block table per row, padded to the longest."""
        pool = self.pool
        width = max(-(-(c.start + 1) // pool.block_size) for c in plan.decodes)
        tables = [_padded(c.sequence.block_table, width) for c in plan.decodes]
        if pool.data.device.type == "cuda":
            return TritonRows(pool, self.positions[: self.decoding], tables, [c.start for c in plan.decodes])
        kind = _NativeDecode if PagedDecode.serves(pool.data, pool.head_dim) else TorchRows
        return kind(pool, tables, [c.start for c in plan.decodes])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        decoder, parts = self._decoder, []
        if decoder is not None and not decoder.writes:
            self.pool.write(layer, self.positions, k[0].transpose(0, 1), v[0].transpose(0, 1))
        elif self.prefills:
            begin = self.decoding
            self.pool.write(
                layer, self.positions[begin:], k[0, :, begin:].transpose(0, 1), v[0, :, begin:].transpose(0, 1)
            )
        if decoder is not None:
            parts.append(decoder.attend(layer, q[0], k[0], v[0], scale, wants))
        parts += [self._prefill(rows, layer, q, k, v, scale, wants) for rows in self.prefills]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0)

    def _prefill(
        self, rows: _PrefillRows, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention
    ) -> Tensor:
        queries, keys, values = (t[:, :, rows.begin : rows.end] for t in (q, k, v))
        if rows.start:
            keys, values = self.pool.gather(layer, rows.blocks, 1)
            length = rows.start + rows.end - rows.begin
            keys, values = keys[:, :, :length], values[:, :, :length]
        return _prefill(queries, keys, values, rows.start, scale, wants)[0].transpose(0, 1)


class _NativeDecode:
    """Decoding rows by the native kernel: each over exactly its own tokens. It also stores the new token."""

    writes = True

    def __init__(self, pool: KVPool, tables: list[list[int]], last: list[int]) -> None:
        self._pool = pool
        self._job = PagedDecode(
            torch.tensor(tables, dtype=torch.int32),
            torch.tensor(last, dtype=torch.int32) + 1,
            kv_heads=pool.kv_heads,
            head_dim=pool.head_dim,
            block_size=pool.block_size,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """q: [heads, tokens, head_dim], k, v: [kv_heads, tokens, head_dim] -> [decoding, heads, head_dim]."""
        keys, values = self._pool.rows(layer)
        return self._job.attend(q, k, v, keys, values, scale=scale, window=wants.window, softcap=wants.softcap)


class TritonRows:
    """Decoding rows on a GPU by Triton. It also stores the new token."""

    writes = True

    def __init__(self, pool: KVPool, positions: Tensor, tables: list[list[int]], last: list[int]) -> None:
        # imported here because only torch's builds for CUDA install Triton
        from lorapool_runtime.engines.torch.model.attention_gpu import TritonDecode

        device = pool.data.device
        contexts = to_device(last, torch.int32, device) + 1
        self._rows = len(last)
        self._job = TritonDecode(pool, positions.int(), contexts, to_device(tables, torch.int32, device))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """q: [heads, tokens, head_dim], k, v: [kv_heads, tokens, head_dim] -> [decoding, heads, head_dim]."""
        q, k, v = (t[:, : self._rows] for t in (q, k, v))
        return self._job.attend(layer, q, k, v, scale=scale, window=wants.window, softcap=wants.softcap)


class TorchRows:
    """Decoding rows by torch: each over as many blocks as the longest has, masked to its own tokens.

    In 16-bit types each row is computed separately over exactly its own tokens. torch's attention computes the
    exponentials of an incomplete last vector of keys differently, and in 16 bits the difference changes the result.
    """

    writes = False

    def __init__(self, pool: KVPool, tables: list[list[int]], last: list[int]) -> None:
        device = pool.data.device
        self._pool, self._rows = pool, len(tables)
        self._blocks = torch.tensor(tables, device=device).view(-1)  # [decoding * width]
        self._lengths = list(enumerate(position + 1 for position in last))
        self._last = torch.tensor(last, device=device)[:, None]  # [decoding, 1]
        self._context = torch.arange(len(tables[0]) * pool.block_size, device=device)  # [width * block_size]
        self._masks: dict[int | None, Tensor] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
        """q: [heads, tokens, head_dim] -> [decoding, heads, head_dim]. Keys and values are in the cache already."""
        n, heads, dim = self._rows, q.shape[0], q.shape[2]
        keys, values = self._pool.gather(layer, self._blocks, n)
        if q.dtype != torch.float32:
            own = [(i, slice(0 if wants.window is None else max(0, m - wants.window), m)) for i, m in self._lengths]
            return torch.cat([_one_row(q[:, i], keys[i, :, at], values[i, :, at], scale, wants) for i, at in own])
        # heads that share a key head become its queries: [n, kv_heads, group, head_dim]
        grouped = q[:, :n].transpose(0, 1).reshape(n, wants.kv_heads, -1, dim)
        out = _attend(grouped, keys, values, self._mask(wants.window, q.dtype), scale, wants.softcap)
        return out.reshape(n, heads, dim)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[decoding, 1, 1, context]; layers with the same window share it."""
        mask = self._masks.get(window)
        if mask is None:
            mask = _additive(_visible(self._last, self._context, window), dtype)[:, None, None]
            self._masks[window] = mask
        return mask


def _flat_positions(chunk: Chunk, block_size: int) -> list[int]:
    table = chunk.sequence.block_table
    return [
        table[p // block_size] * block_size + p % block_size for p in range(chunk.start, chunk.start + chunk.num_tokens)
    ]


def _padded(table: list[int], width: int) -> list[int]:
    return table[:width] + [NULL_BLOCK] * (width - len(table))


def _visible(at: Tensor, context: Tensor, window: int | None) -> Tensor:
    """Whether the token of each row may attend to each position. at: [rows, 1], context: [length] -> [rows, length]."""
    visible = context <= at
    return visible if window is None else visible & (context > at - window)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _prefill(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, wants: LayerAttention) -> Tensor:
    """q: [1, heads, n, head_dim], k, v: [1, kv_heads, start + n, head_dim] -> [1, heads, n, head_dim]."""
    n, length = q.shape[2], k.shape[2]
    if start == 0 and wants.softcap is None and (wants.window is None or n <= wants.window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    at = torch.arange(start, length, device=q.device)[:, None]
    mask = _additive(_visible(at, torch.arange(length, device=q.device), wants.window), q.dtype)
    group = q.shape[1] // wants.kv_heads
    folded = q.reshape(1, wants.kv_heads, group * n, q.shape[3])
    return _attend(folded, k, v, mask.repeat(group, 1), scale, wants.softcap).reshape(q.shape)


def _one_row(q: Tensor, k: Tensor, v: Tensor, scale: float, wants: LayerAttention) -> Tensor:
    """q: [heads, head_dim] of one token that sees all of k, v: [kv_heads, length, head_dim] -> [1, heads, head_dim]."""
    if wants.softcap is None:
        grouped = q.shape[0] != k.shape[0]
        return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], scale=scale, enable_gqa=grouped)[
            :, :, 0
        ]
    folded = q.view(1, wants.kv_heads, -1, q.shape[1])
    return _attend(folded, k[None], v[None], q.new_zeros(()), scale, wants.softcap).view(1, *q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """q: [rows, kv_heads, queries, head_dim], k, v: [rows, kv_heads, length, head_dim]; mask broadcasts over heads."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # the operators of transformers in the same order, because in bfloat16 each of them rounds
    scores = torch.tanh(torch.matmul(q, k.transpose(2, 3)) * scale / softcap) * softcap + mask
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)
