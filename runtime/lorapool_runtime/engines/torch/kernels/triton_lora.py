"""Triton kernels that add LoRA to the rows of a batch on a GPU, and the torch operators that launch them.

`lora_rows` is for decoding: one program per row, as in BGMV of Punica (Chen et al., 2023, arXiv:2310.18547).
`lora_segments` is for prefill: tiles of rows of one slot through tensor cores, as in SGMV of Punica and the
mixed-rank kernels of S-LoRA (Sheng et al., 2023, arXiv:2311.03285). The grid depends on shapes only, never on data, so
that a CUDA graph can hold a launch; slots, ranks and offsets are read on the device. Sums have a fixed order and use no
atomics, so a row's result does not depend on the other rows of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_RANK = 16
"""Ranks that one program computes; an adapter of rank r costs ceil(r / 16) blocks of work, whatever max_rank is."""
BLOCK_OUT = 256
"""Output columns that one program of the expand step writes."""
SEGMENT_ROWS = 32
"""Rows of one slot in a tile of the prefill kernels."""
SEGMENT_FIELDS = 3
"""Columns of the table of row tiles: slot (-1: none), first index into `order`, number of rows."""
TILE_FIELDS = 4
"""Columns of the table of output tiles: member, its width, the tile's first column in the member, the member's in y."""
ALIGNED = 16
"""Where all widths are multiples of this many elements, they are read in whole vectors."""

_ROWS_IN, _SEGMENTS_IN = 1024, 4096
"""Input features that one program sums; other programs sum the rest, and the expand step adds the parts."""
_BY_ROWS = ("p_split", "p_member")
"""Arguments that depend on the number of rows: no kernel is compiled again for them while requests wait."""


def output_tiles(out_features: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """The rows of the table of output tiles (TILE_FIELDS) of a group whose members have these widths."""
    tiles, column = [], 0
    for member, width in enumerate(out_features):
        tiles += [(member, width, first, column) for first in range(0, width, BLOCK_OUT)]
        column += width
    return tiles


@triton.jit(do_not_specialize=_BY_ROWS)
def _shrink_rows(
    x, row_slots, memory, ranks, a_at, parts,
    x_row, slots, p_split, p_member, p_row, in_features,
    RANK_BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PER_SPLIT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """parts[split, member, row, rank] = x[row, split's features] . A[slot, member][rank, split's features]"""
    row, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        member, first = block // RANK_BLOCKS, (block % RANK_BLOCKS) * BLOCK_R
        rank = tl.load(ranks + member * slots + slot)
        if first < rank:
            r = first + tl.arange(0, BLOCK_R)
            at = tl.multiple_of(tl.load(a_at + member * slots + slot), ALIGN)
            sums = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
            for begin in range(0, PER_SPLIT, BLOCK_K):
                k = split * PER_SPLIT + begin + tl.arange(0, BLOCK_K)
                inside = k < in_features
                values = tl.load(x + row.to(tl.int64) * x_row + k, mask=inside, other=0.0).to(tl.float32)
                held = (r < rank)[:, None] & inside[None, :]
                tile = tl.load(memory + at + r[:, None] * in_features + k[None, :], mask=held, other=0.0)
                sums += tile.to(tl.float32) * values[None, :]
            tl.store(parts + split * p_split + member * p_member + row * p_row + r, tl.sum(sums, axis=1), mask=r < rank)


@triton.jit(do_not_specialize=_BY_ROWS)
def _expand_rows(
    row_slots, memory, ranks, b_at, tiles, parts, y,
    slots, p_split, p_member, p_row, y_row, splits,
    SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """y[row, tile] += (sum of parts over the splits)[row, member's ranks] . B[slot, member][rank, tile]"""
    row, fields = tl.program_id(0), tiles + tl.program_id(1) * TILE
    slot = tl.load(row_slots + row)
    if slot >= 0:
        member = tl.load(fields)
        rank = tl.load(ranks + member * slots + slot)
        if rank > 0:
            width = tl.multiple_of(tl.load(fields + 1), ALIGN)
            n = tl.multiple_of(tl.load(fields + 2), ALIGN) + tl.arange(0, BLOCK_N)
            at = tl.multiple_of(tl.load(b_at + member * slots + slot), ALIGN)
            split = tl.arange(0, SPLITS)
            sums = tl.zeros((BLOCK_N,), dtype=tl.float32)
            for begin in range(0, rank, BLOCK_R):
                r = begin + tl.arange(0, BLOCK_R)
                place = parts + split[:, None] * p_split + member * p_member + row * p_row + r[None, :]
                u = tl.sum(tl.load(place, mask=(split < splits)[:, None] & (r < rank)[None, :], other=0.0), axis=0)
                held = (r < rank)[:, None] & (n < width)[None, :]
                block = tl.load(memory + at + r[:, None] * width + n[None, :], mask=held, other=0.0)
                sums += tl.sum(block.to(tl.float32) * u[:, None], axis=0)
            out = y + row.to(tl.int64) * y_row + tl.multiple_of(tl.load(fields + 3), ALIGN) + n
            before = tl.load(out, mask=n < width, other=0.0).to(tl.float32)
            tl.store(out, (before + sums).to(y.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=_BY_ROWS)
def _shrink_segments(
    x, order, segments, memory, ranks, a_at, parts,
    x_row, slots, p_split, p_member, p_row, in_features,
    RANK_BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_SPLIT: tl.constexpr, SEGMENT: tl.constexpr, ALIGN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Computes what _shrink_rows does, for a tile of rows of one slot at once."""
    segment, block, split = segments + tl.program_id(0) * SEGMENT, tl.program_id(1), tl.program_id(2)
    slot = tl.load(segment)
    if slot >= 0:
        member, first = block // RANK_BLOCKS, (block % RANK_BLOCKS) * BLOCK_R
        rank = tl.load(ranks + member * slots + slot)
        if first < rank:
            r, m = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_M)
            mine = m < tl.load(segment + 2)
            rows = tl.load(order + tl.load(segment + 1) + m, mask=mine, other=0).to(tl.int64)
            at = tl.multiple_of(tl.load(a_at + member * slots + slot), ALIGN)
            sums = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for begin in range(0, PER_SPLIT, BLOCK_K):
                k = split * PER_SPLIT + begin + tl.arange(0, BLOCK_K)
                inside = k < in_features
                held = mine[:, None] & inside[None, :]
                values = tl.load(x + rows[:, None] * x_row + k[None, :], mask=held, other=0.0)
                held = inside[:, None] & (r < rank)[None, :]
                tile = tl.load(memory + at + r[None, :] * in_features + k[:, None], mask=held, other=0.0)
                if WIDEN:
                    values, tile = values.to(tl.float32), tile.to(tl.float32)
                sums += tl.dot(values, tile, input_precision="ieee")
            place = parts + split * p_split + member * p_member + rows[:, None] * p_row + r[None, :]
            tl.store(place, sums, mask=mine[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=_BY_ROWS)
def _expand_segments(
    order, segments, memory, ranks, b_at, tiles, parts, y,
    slots, p_split, p_member, p_row, y_row, splits,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENT: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What _expand_rows computes, for a tile of rows of one slot at once."""
    segment, fields = segments + tl.program_id(0) * SEGMENT, tiles + tl.program_id(1) * TILE
    slot = tl.load(segment)
    if slot >= 0:
        member = tl.load(fields)
        rank = tl.load(ranks + member * slots + slot)
        if rank > 0:
            m = tl.arange(0, BLOCK_M)
            mine = m < tl.load(segment + 2)
            rows = tl.load(order + tl.load(segment + 1) + m, mask=mine, other=0).to(tl.int64)
            width = tl.multiple_of(tl.load(fields + 1), ALIGN)
            n = tl.multiple_of(tl.load(fields + 2), ALIGN) + tl.arange(0, BLOCK_N)
            at = tl.multiple_of(tl.load(b_at + member * slots + slot), ALIGN)
            sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for begin in range(0, rank, BLOCK_R):
                r = begin + tl.arange(0, BLOCK_R)
                held = mine[:, None] & (r < rank)[None, :]
                place = parts + member * p_member + rows[:, None] * p_row + r[None, :]
                u = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
                for split in range(0, splits):
                    u += tl.load(place + split * p_split, mask=held, other=0.0)
                held = (r < rank)[:, None] & (n < width)[None, :]
                block = tl.load(memory + at + r[:, None] * width + n[None, :], mask=held, other=0.0)
                u = u.to(block.dtype)
                if WIDEN:
                    u, block = u.to(tl.float32), block.to(tl.float32)
                sums += tl.dot(u, block, input_precision="ieee")
            out = y + rows[:, None] * y_row + tl.multiple_of(tl.load(fields + 3), ALIGN) + n[None, :]
            held = mine[:, None] & (n < width)[None, :]
            tl.store(out, (tl.load(out, mask=held, other=0.0).to(tl.float32) + sums).to(y.dtype.element_ty), mask=held)


@torch.library.custom_op("lorapool::lora_rows", mutates_args=("y",))
def lora_rows(
    x: Tensor, row_slots: Tensor, memory: Tensor, ranks: Tensor, a_at: Tensor, b_at: Tensor, tiles: Tensor,
    max_rank: int, align: int, y: Tensor,
) -> None:  # fmt: skip
    """y[i] += (x[i] A_s^T) B_s with s = row_slots[i], in place; a row of slot -1 reads and writes nothing.

    x: [rows, in]; row_slots: int32 [rows]; memory: [elements], with the group's A [rank, in] and B [rank, out] at
    the offsets a_at and b_at, int64 [members, slots]; ranks: int32 [members, slots]; tiles: int64 [tiles,
    TILE_FIELDS]; align: ALIGNED where `in` and all outs are multiples of it, else 1; y: [rows, out of all members]. x,
    memory, y of one type, the last dimension of each contiguous.
    """
    rows, in_features, (members, slots) = x.shape[0], x.shape[1], ranks.shape
    splits, block_in = -(-in_features // _ROWS_IN), min(256, triton.next_power_of_2(min(in_features, _ROWS_IN)))
    per_split = _ROWS_IN if splits > 1 else -(-in_features // block_in) * block_in
    rank_blocks = -(-max_rank // BLOCK_RANK)
    parts = torch.empty((splits, members, rows, max_rank), dtype=torch.float32, device=x.device)
    _shrink_rows[(rows, members * rank_blocks, splits)](
        x, row_slots, memory, ranks, a_at, parts,
        x.stride(0), slots, parts.stride(0), parts.stride(1), parts.stride(2), in_features,
        RANK_BLOCKS=rank_blocks, BLOCK_R=BLOCK_RANK, BLOCK_K=block_in, PER_SPLIT=per_split, ALIGN=align,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _expand_rows[(rows, tiles.shape[0])](
        row_slots, memory, ranks, b_at, tiles, parts, y,
        slots, parts.stride(0), parts.stride(1), parts.stride(2), y.stride(0), splits,
        SPLITS=triton.next_power_of_2(splits), BLOCK_R=BLOCK_RANK, BLOCK_N=BLOCK_OUT, TILE=TILE_FIELDS, ALIGN=align,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@torch.library.custom_op("lorapool::lora_segments", mutates_args=("y",))
def lora_segments(
    x: Tensor, order: Tensor, segments: Tensor, memory: Tensor, ranks: Tensor, a_at: Tensor, b_at: Tensor,
    tiles: Tensor, max_rank: int, align: int, y: Tensor,
) -> None:  # fmt: skip
    """`lora_rows` for many rows per slot. order: int32 [rows], the rows of adapters, those of one slot adjacent;
    segments: int32 [segments, SEGMENT_FIELDS], each at most SEGMENT_ROWS rows of one slot; the rest is the same."""
    rows, in_features, (members, slots) = x.shape[0], x.shape[1], ranks.shape
    splits = -(-in_features // _SEGMENTS_IN)
    block_in = max(16, min(64, triton.next_power_of_2(min(in_features, _SEGMENTS_IN))))
    per_split = _SEGMENTS_IN if splits > 1 else -(-in_features // block_in) * block_in
    rank_blocks = -(-max_rank // BLOCK_RANK)
    widen = x.device.type == "cpu"  # Triton's interpreter would multiply the bit patterns of bfloat16
    parts = torch.empty((splits, members, rows, max_rank), dtype=torch.float32, device=x.device)
    _shrink_segments[(segments.shape[0], members * rank_blocks, splits)](
        x, order, segments, memory, ranks, a_at, parts,
        x.stride(0), slots, parts.stride(0), parts.stride(1), parts.stride(2), in_features,
        RANK_BLOCKS=rank_blocks, BLOCK_M=SEGMENT_ROWS, BLOCK_R=BLOCK_RANK, BLOCK_K=block_in, PER_SPLIT=per_split,
        SEGMENT=SEGMENT_FIELDS, ALIGN=align, WIDEN=widen, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _expand_segments[(segments.shape[0], tiles.shape[0])](
        order, segments, memory, ranks, b_at, tiles, parts, y,
        slots, parts.stride(0), parts.stride(1), parts.stride(2), y.stride(0), splits,
        BLOCK_M=SEGMENT_ROWS, BLOCK_R=BLOCK_RANK, BLOCK_N=BLOCK_OUT, SEGMENT=SEGMENT_FIELDS, TILE=TILE_FIELDS,
        ALIGN=align, WIDEN=widen, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@lora_rows.register_fake
def _(*arguments: object) -> None:
    return None


@lora_segments.register_fake
def _(*arguments: object) -> None:
    return None
