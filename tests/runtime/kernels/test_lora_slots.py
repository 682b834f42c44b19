"""Slots of adapter weights: their own memory, written by a prefix and cleared to zeros, or their adapters'; counted by
the system either way."""

from __future__ import annotations

import ctypes
import gc
import mmap

import numpy as np
import pytest
import torch
from lora_kit import RandomAdapter

from lorapool_runtime.engines.torch.lora.slots import Slabs
from lorapool_runtime.weights.pack import zeroed
from lorapool_runtime.weights.targets import TargetGroup

GROUPS = (TargetGroup(("q", "k"), 512, (512, 128)), TargetGroup(("o",), 512, (512,)))


def adapter(rank: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> RandomAdapter:
    made = RandomAdapter(GROUPS, (rank,) * 3, np.random.default_rng(0), dtype)
    made.tensor.fill_(value)
    return made


def slabs(dtype: torch.dtype = torch.float32, max_rank: int = 64, *, sharing: bool = False) -> Slabs:
    return Slabs(GROUPS, slots=3, max_rank=max_rank, dtype=dtype, device=torch.device("cpu"), sharing=sharing)


def kept(rank: int, dtype: torch.dtype = torch.float32) -> RandomAdapter:
    """In memory of its own, as `adapter_file` keeps them."""
    made = RandomAdapter(GROUPS, (rank, 0, rank), np.random.default_rng(rank), dtype)
    buffer = zeroed(len(made.buffer), made.buffer.dtype)
    buffer[:] = made.buffer
    made.buffer, made.tensor = buffer, torch.from_numpy(buffer).view(dtype)
    return made


def load(made: Slabs, slot: int, weights: RandomAdapter) -> None:
    made.fill(slot, weights)
    made.publish(slot, weights.layout)


def parts(made: Slabs, slot: int) -> list[torch.Tensor]:
    found = []
    for group in range(len(GROUPS)):
        span = made.span(group, slot, 1)
        assert span is not None
        found += [span[0], *(b for _, _, b in span[1])]
    return found


def test_an_untouched_slot_costs_nothing() -> None:
    made = slabs()
    assert [made.resident_bytes(slot) for slot in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("max_rank", [64, 1024])  # 1024: slots of 13 MB, which use huge pages
def test_a_low_rank_touches_its_own_bytes_only(max_rank: int) -> None:
    made, weights = slabs(max_rank=max_rank), adapter(rank=max_rank // 3)
    load(made, 1, weights)
    assert weights.buffer.nbytes <= made.resident_bytes(1) < weights.buffer.nbytes + mmap.PAGESIZE
    assert (made.resident_bytes(0), made.resident_bytes(2)) == (0, 0)


def test_reading_a_slot_does_not_count_as_having_it() -> None:
    made = slabs()
    assert float(made.memory.sum()) == 0
    assert made.resident_bytes(0) == 0


@pytest.mark.parametrize("max_rank", [64, 1024])
def test_releasing_gives_back_what_was_measured_and_leaves_zeros(max_rank: int) -> None:
    made = slabs(max_rank=max_rank)
    load(made, 0, adapter(max_rank // 2, 2.0))
    load(made, 1, adapter(max_rank, 3.0))
    held = made.resident_bytes(1)
    made.withdraw(1)
    assert made.release(1) == held > 0
    assert made.resident_bytes(1) == 0
    stride = len(made.memory) // 3
    assert not made.memory[stride : 2 * stride].any()
    assert all(bool((part == 2.0).all()) for part in parts(made, 0))
    assert not made.occupied(1)


@pytest.mark.parametrize("max_rank", [64, 1024])
def test_nothing_stays_of_a_larger_adapter_that_was_there_before(max_rank: int) -> None:
    made, smaller = slabs(max_rank=max_rank), adapter(max_rank // 3)
    load(made, 1, adapter(max_rank, 3.0))
    made.withdraw(1)
    load(made, 1, smaller)
    assert made.resident_bytes(1) < smaller.buffer.nbytes + mmap.PAGESIZE
    stride = len(made.memory) // 3
    assert not made.memory[stride + len(smaller.buffer) : 2 * stride].any()


@pytest.mark.parametrize("sharing", [False, True])
def test_a_published_slot_is_neither_filled_nor_released(sharing: bool) -> None:
    made = slabs(sharing=sharing)
    load(made, 2, adapter(2))
    for forbidden in (lambda: made.fill(2, adapter(2)), lambda: made.release(2)):
        with pytest.raises(ValueError, match="not empty"):
            forbidden()


@pytest.mark.parametrize("sharing", [False, True])
def test_an_adapter_above_the_slots_rank_is_not_filled_in(sharing: bool) -> None:
    made = slabs(max_rank=4, sharing=sharing)
    with pytest.raises(ValueError, match="does not fit"):
        made.fill(0, adapter(5))


def test_the_tables_say_where_the_slot_has_what() -> None:
    made, weights = slabs(), RandomAdapter(GROUPS, (5, 0, 3), np.random.default_rng(1))
    load(made, 2, weights)
    linears = [(group, member) for group in made.groups for member in range(len(group.out_features))]
    assert [int(group.ranks[member, 2]) for group, member in linears] == [5, 0, 3]
    for number, (group, member) in enumerate(linears):
        assert not group.ranks[member, :2].any()
        if rank := int(group.ranks[member, 2]):
            a_at, b_at = int(group.a_at[member, 2]), int(group.b_at[member, 2])
            width, out = group.in_features, group.out_features[member]
            assert torch.equal(group.memory[a_at : a_at + rank * width].view(rank, width), weights.a(number))
            assert torch.equal(group.memory[b_at : b_at + rank * out].view(rank, out), weights.b(number))


def test_bfloat16_arrives_bit_for_bit() -> None:
    made, weights = slabs(torch.bfloat16), RandomAdapter(GROUPS, (3, 2, 1), np.random.default_rng(2), torch.bfloat16)
    load(made, 0, weights)
    assert torch.equal(made.memory[: weights.layout.elements].view(torch.int16), weights.tensor.view(torch.int16))


def test_slots_do_not_overlap_and_start_on_pages() -> None:
    made = slabs()
    assert len(made.memory) // 3 * 4 % mmap.PAGESIZE == 0
    assert made.memory.data_ptr() % mmap.PAGESIZE == 0
    for slot in range(3):
        load(made, slot, adapter(64, float(slot + 1)))
    for slot in range(3):
        assert all(bool((part == slot + 1).all()) for part in parts(made, slot))


# --- slots that are their adapters' own memory ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_slot_is_its_adapter(dtype: torch.dtype) -> None:
    made, weights = slabs(dtype, sharing=True), kept(7, dtype)
    load(made, 1, weights)
    for group, parts_of in ((0, 1), (1, 1)):  # the adapter leaves k alone
        span = made.span(group, 1, 1)
        assert span is not None
        assert span[0].shape == (1, 7, 512)
        assert len(span[1]) == parts_of
        assert span[0].data_ptr() in range(weights.tensor.data_ptr(), weights.tensor.data_ptr() + weights.buffer.nbytes)
    group = made.groups[1]
    at = made.memory.data_ptr() + int(group.a_at[0, 1]) * dtype.itemsize
    there = (ctypes.c_char * (7 * 512 * dtype.itemsize)).from_address(at).raw
    assert there == weights.a(2).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
    assert not group.ranks[:, [0, 2]].any()


def test_a_shared_slot_gives_back_what_nobody_else_holds() -> None:
    made = slabs(sharing=True)
    alone, elsewhere = kept(8), kept(9)
    size = alone.buffer.nbytes
    load(made, 0, alone)
    load(made, 1, elsewhere)
    load(made, 2, elsewhere)
    assert size <= made.resident_bytes(0) <= size + 2 * mmap.PAGESIZE
    held = made.resident_bytes(0)
    for slot in range(3):
        made.withdraw(slot)
    del alone
    gc.collect()
    assert made.release(0) == held
    assert (made.resident_bytes(0), made.release(0)) == (0, 0)
    assert (made.release(1), made.resident_bytes(1)) == (0, 0)  # slot 2 and this test hold it
    del elsewhere
    gc.collect()
    assert made.release(2) > 0


def test_shared_slots_are_no_neighbours() -> None:
    made = slabs(sharing=True)
    load(made, 0, kept(4))
    load(made, 1, kept(4))
    with pytest.raises(ValueError, match="share no memory"):
        made.span(0, 0, 2)
