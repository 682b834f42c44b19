"""Slots of adapter weights: written by a prefix, cleared to zeros, counted by the kernel."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from lora_kit import RandomAdapter

from lorapool_runtime.slabs import Slabs
from lorapool_runtime.targets import TargetGroup

GROUPS = (TargetGroup(("q", "k"), 512, (512, 128)), TargetGroup(("o",), 512, (512,)))


def adapter(rank: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> RandomAdapter:
    made = RandomAdapter(GROUPS, (rank,) * 3, np.random.default_rng(0), dtype)
    made.tensor.fill_(value)
    return made


def slabs(dtype: torch.dtype = torch.float32, max_rank: int = 64) -> Slabs:
    return Slabs(GROUPS, slots=3, max_rank=max_rank, dtype=dtype, device=torch.device("cpu"))


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
    stride = made.slot_bytes // 4
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
    stride = made.slot_bytes // 4
    assert not made.memory[stride + len(smaller.buffer) : 2 * stride].any()


def test_a_published_slot_is_neither_filled_nor_released() -> None:
    made = slabs()
    load(made, 2, adapter(2))
    for forbidden in (lambda: made.fill(2, adapter(2)), lambda: made.release(2)):
        with pytest.raises(ValueError, match="not empty"):
            forbidden()


def test_an_adapter_above_the_slots_rank_is_not_filled_in() -> None:
    made = slabs(max_rank=4)
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
    assert made.slot_bytes % mmap.PAGESIZE == 0
    assert made.memory.data_ptr() % mmap.PAGESIZE == 0
    for slot in range(3):
        load(made, slot, adapter(64, float(slot + 1)))
    for slot in range(3):
        assert all(bool((part == slot + 1).all()) for part in parts(made, slot))
