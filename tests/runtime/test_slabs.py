"""Slots of adapter weights: written by a prefix, cleared to zeros, counted by the kernel."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lorapool_runtime.slabs import Slabs
from lorapool_runtime.targets import TargetGroup

GROUPS = (TargetGroup(("q", "k"), 512, (512, 128)), TargetGroup(("o",), 512, (512,)))


@dataclass(frozen=True)
class Part:
    a: np.ndarray
    b: tuple[np.ndarray, ...]


def weights(rank: int, value: float = 1.0) -> dict[int, Part]:
    return {
        number: Part(
            np.full((rank, group.size, group.in_features), value, np.float32),
            tuple(np.full((rank, out), value, np.float32) for out in group.out_features),
        )
        for number, group in enumerate(GROUPS)
    }


def slabs(dtype: torch.dtype = torch.float32) -> Slabs:
    return Slabs(GROUPS, slots=3, max_rank=64, dtype=dtype, device=torch.device("cpu"))


def test_an_untouched_slot_costs_nothing() -> None:
    made = slabs()
    assert [made.resident_bytes(slot) for slot in range(3)] == [0, 0, 0]


def test_a_low_rank_touches_its_own_bytes_only() -> None:
    made = slabs()
    made.write(1, weights(rank=4))
    written = sum(p.a.nbytes + sum(b.nbytes for b in p.b) for p in weights(4).values())
    pages_at_edges = 2 * 5 * mmap.PAGESIZE
    assert written <= made.resident_bytes(1) <= written + pages_at_edges
    assert made.slot_bytes > 8 * made.resident_bytes(1)
    assert (made.resident_bytes(0), made.resident_bytes(2)) == (0, 0)


def test_reading_a_slot_does_not_count_as_having_it() -> None:
    made = slabs()
    assert float(made.a[0].sum()) == 0
    assert made.resident_bytes(0) == 0


def test_clearing_gives_back_what_was_measured_and_leaves_zeros() -> None:
    made = slabs()
    made.write(0, weights(4, 2.0))
    made.write(1, weights(8, 3.0))
    held = made.resident_bytes(1)
    assert made.clear(1) == held > 0
    assert made.resident_bytes(1) == 0
    assert all(float(slab[1].abs().sum()) == 0 for slab in (*made.a, *made.b[0], *made.b[1]))
    assert float(made.a[0][0, :4].mean()) == 2.0
    assert not made.occupied(1)


def test_a_slot_is_written_only_when_empty() -> None:
    made = slabs()
    made.write(2, weights(2))
    with pytest.raises(ValueError, match="not empty"):
        made.write(2, weights(2))


def test_ranks_are_known_per_group_and_slot() -> None:
    made = slabs()
    made.write(2, {1: weights(5)[1]})
    assert made.ranks == [[0, 0, 0], [0, 0, 5]]


def test_bfloat16_arrives_bit_for_bit() -> None:
    made = slabs(torch.bfloat16)
    bits = np.full((2, 1, 512), 0x3F80, np.uint16)  # 1.0
    made.write(0, {1: Part(bits, (np.full((2, 512), 0xC000, np.uint16),))})  # -2.0
    assert float(made.a[1][0, :2].float().mean()) == 1.0
    assert float(made.b[1][0][0, :2].float().mean()) == -2.0


def test_slots_do_not_overlap_and_start_on_pages() -> None:
    made = slabs()
    assert made.slot_bytes % mmap.PAGESIZE == 0
    for slot in range(3):
        made.write(slot, weights(64, float(slot + 1)))
    for slot in range(3):
        for slab in (*made.a, *made.b[0], *made.b[1]):
            assert bool((slab[slot] == slot + 1).all())
