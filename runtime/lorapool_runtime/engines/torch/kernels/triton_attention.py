"""Triton kernels for decode attention over paged keys and values, and the torch operators that launch them.

One query per row, as in FlashDecoding (Dao et al., 2023), over the block tables of PagedAttention (Kwon et al., 2023,
arXiv:2309.06180): each row's context is divided into a fixed number of parts; one program per part and key head
computes all query heads that share it, and a second kernel joins the parts. The grid depends on shapes only, so a CUDA
graph can hold a launch while contexts grow. A row of context 0 writes zeros. Nothing beyond a row's context is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_TOKENS = 64
_BLOCK_BYTES = 512 * _BLOCK_TOKENS
"""Shared memory per program for keys, and again for values: with wider heads, fewer tokens are read at a time."""
_PARTS = 8
"""The same for all batches and tables, so that a row's result does not depend on them and no kernel is compiled while
requests wait."""
_FEWEST_QUERIES = 16  # the smallest tile that tensor cores multiply


@triton.jit
def _write(
    keys, values, at, k, v,
    pool_row, pool_head, new_row, new_head,
    HEADS: tl.constexpr, HEADS_UP: tl.constexpr, DIM: tl.constexpr, DIM_UP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.load(at + row).to(tl.int64)
    if place >= 0:
        h, d = tl.arange(0, HEADS_UP)[:, None], tl.arange(0, DIM_UP)[None, :]
        mask = (h < HEADS) & (d < DIM)
        source, target = row * new_row + h * new_head + d, place * pool_row + h * pool_head + d
        tl.store(keys + target, tl.load(k + source, mask=mask), mask=mask)
        tl.store(values + target, tl.load(v + source, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["table_row"])
def _attend(
    q, keys, values, tables, contexts, sums, peaks, weights,
    q_row, q_head, pool_row, pool_head, table_row, heads, scale, softcap,
    GROUP: tl.constexpr, GROUP_UP: tl.constexpr, DIM: tl.constexpr, DIM_UP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """sums[row, head, part] = sum of exp(score - peak) value; weights: of exp(score - peak); peaks: the maximum."""
    row, key_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(contexts + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    each = tl.cdiv(tl.cdiv(context - first, TOKENS), PARTS) * TOKENS
    begin = first + part * each
    end = tl.minimum(begin + each, context)
    g, d = tl.arange(0, GROUP_UP), tl.arange(0, DIM_UP)
    head = key_head * GROUP + g
    mine = (g < GROUP)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + row * q_row + head[:, None] * q_head + d[None, :], mask=mine, other=0.0)
    if WIDEN:
        query = query.to(tl.float32)
    peak = tl.full((GROUP_UP,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((GROUP_UP,), dtype=tl.float32)
    total = tl.zeros((GROUP_UP, DIM_UP), dtype=tl.float32)
    for at in range(begin, end, TOKENS):
        t = at + tl.arange(0, TOKENS)
        seen = t < end
        block = tl.load(tables + row * table_row + t // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
        place = (block * BLOCK_SIZE + t % BLOCK_SIZE) * pool_row + key_head * pool_head
        held = seen[:, None] & (d < DIM)[None, :]
        key = tl.load(keys + place[:, None] + d[None, :], mask=held, other=0.0)
        value = tl.load(values + place[:, None] + d[None, :], mask=held, other=0.0)
        if WIDEN:
            key, value = key.to(tl.float32), value.to(tl.float32)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        shrink = tl.exp(peak - higher)
        chance = tl.exp(score - higher[:, None])
        weight = weight * shrink + tl.sum(chance, axis=1)
        total = total * shrink[:, None] + tl.dot(chance.to(value.dtype), value, input_precision="ieee")
        peak = higher
    place = (row * heads + head) * PARTS + part
    tl.store(peaks + place, peak, mask=g < GROUP)
    tl.store(weights + place, weight, mask=g < GROUP)
    tl.store(sums + place[:, None] * DIM + d[None, :], total, mask=mine)


@triton.jit
def _join(
    sums, peaks, weights, out, out_row, heads,
    DIM: tl.constexpr, DIM_UP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[row, head] = the parts' sums over the parts' weights, each scaled to the highest peak."""
    row, head = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, PARTS), tl.arange(0, DIM_UP)
    place = (row * heads + head) * PARTS + part
    peak, weight = tl.load(peaks + place), tl.load(weights + place)
    top = tl.max(peak, axis=0)
    # a row without context has no peak at all; an empty part's weight and sum are zero
    scale = tl.exp(peak - tl.where(top == float("-inf"), 0.0, top))
    total = tl.load(sums + place[:, None] * DIM + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    whole = tl.sum(weight * scale, axis=0)
    value = tl.sum(total * scale[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(out + row * out_row + head * DIM + d, value.to(out.dtype.element_ty), mask=d < DIM)


@torch.library.custom_op("lorapool::paged_write", mutates_args=("keys", "values"))
def paged_write(keys: Tensor, values: Tensor, at: Tensor, k: Tensor, v: Tensor) -> None:
    """keys[at[i]], values[at[i]] = k[i], v[i]; a row with a negative index is not written.

    keys, values: [tokens of the pool, kv_heads, head_dim] of equal strides; at: int32 [rows]; k, v: [rows, kv_heads,
    head_dim] of equal strides; all of one type, the last dimension contiguous.
    """
    rows, heads, dim = k.shape
    k, v = _alike(k, v)
    _write[(rows,)](
        keys, values, at, k, v, keys.stride(0), keys.stride(1), k.stride(0), k.stride(1),
        HEADS=heads, HEADS_UP=triton.next_power_of_2(heads), DIM=dim, DIM_UP=triton.next_power_of_2(dim),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@torch.library.custom_op("lorapool::paged_attend", mutates_args=())
def paged_attend(
    q: Tensor, keys: Tensor, values: Tensor, tables: Tensor, contexts: Tensor, block_size: int, scale: float,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention of one new token per row over its own context, itself included -> [rows, heads, head_dim].

    q: [rows, heads, head_dim]; keys, values: [tokens of the pool, kv_heads, head_dim] of equal strides; tables: int32
    [rows, blocks], contexts: int32 [rows], tokens; window: tokens that a row attends to, 0 for all; softcap: 0 for
    none. q, keys, values of one type, the last dimension contiguous. Query head h reads key head h * kv_heads // heads.
    """
    (rows, heads, dim), kv_heads = q.shape, keys.shape[1]
    parts = _PARTS
    dim_up = max(16, triton.next_power_of_2(dim))
    tokens = min(_BLOCK_TOKENS, _BLOCK_BYTES // (dim_up * q.itemsize))
    group = heads // kv_heads
    sums = torch.empty((rows, heads, parts, dim), dtype=torch.float32, device=q.device)
    peaks, weights = (torch.empty((rows, heads, parts), dtype=torch.float32, device=q.device) for _ in range(2))
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    _attend[(rows, kv_heads, parts)](
        q, keys, values, tables, contexts, sums, peaks, weights,
        q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), tables.stride(0), heads, scale, softcap,
        GROUP=group, GROUP_UP=max(_FEWEST_QUERIES, triton.next_power_of_2(group)), DIM=dim, DIM_UP=dim_up,
        BLOCK_SIZE=block_size, TOKENS=tokens, PARTS=parts, WINDOW=window, SOFTCAP=softcap > 0,
        WIDEN=q.device.type == "cpu",  # Triton's interpreter would multiply the bit patterns of bfloat16
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _join[(rows, heads)](
        sums, peaks, weights, out, out.stride(0), heads, DIM=dim, DIM_UP=dim_up, PARTS=parts,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _alike(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with equal strides and a contiguous last dimension: as views of a fused product they may differ."""
    if k.stride() == v.stride() and k.stride(2) == 1:
        return k, v
    return k.contiguous(), v.contiguous()


@paged_write.register_fake
def _(*arguments: object) -> None:
    return None


@paged_attend.register_fake
def _(q: Tensor, *arguments: object) -> Tensor:
    return q.new_empty(q.shape)
