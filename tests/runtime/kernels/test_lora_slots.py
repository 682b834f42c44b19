"""Adapter slots: one owner of what they hold, where it is stored, and whether requests reach it."""

from __future__ import annotations

import ctypes
import gc
import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lora_kit import RandomAdapter

from lorapool_api.base_modules import ModuleKind
from lorapool_runtime.engines.torch.lora.slot_state import IllegalSlotMoveError, WrongWeightsError
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.host_memory import huge_page_zeros
from lorapool_runtime.weights.targets import TargetGroup

EMBED = ModuleKind.EMBEDDING
GROUPS = (TargetGroup(("q", "k"), 512, (512, 128)), TargetGroup(("o",), 512, (512,)))


def adapter(rank: int, dtype: torch.dtype = torch.float32) -> RandomAdapter:
    """In memory of its own, as the reader makes them."""
    made = RandomAdapter(GROUPS, (rank, 0, rank), np.random.default_rng(rank), dtype)
    buffer = huge_page_zeros(len(made.buffer), made.buffer.dtype)
    buffer[:] = made.buffer
    made.buffer, made.tensor = buffer, torch.from_numpy(buffer).view(dtype)
    return made


def slots(dtype: torch.dtype = torch.float32, max_rank: int = 64, *, in_host_memory: bool = True) -> AdapterSlots:
    device = torch.device("cpu")
    return AdapterSlots(GROUPS, slots=3, max_rank=max_rank, dtype=dtype, device=device, in_host_memory=in_host_memory)


def load(made: AdapterSlots, slot: int, weights: RandomAdapter) -> int:
    occupied_bytes = made.fill(slot, weights)
    made.publish(slot)
    return occupied_bytes


# --- moves ---


@pytest.mark.parametrize("in_host_memory", [False, True])
def test_a_published_slot_is_neither_filled_nor_released_nor_published_again(in_host_memory: bool) -> None:
    made = slots(in_host_memory=in_host_memory)
    load(made, 2, adapter(2))
    forbidden: list[Callable[[], object]] = [
        lambda: made.fill(2, adapter(3)),
        lambda: made.release(2),
        lambda: made.publish(2),
    ]
    for move in forbidden:
        with pytest.raises(IllegalSlotMoveError, match="slot 2 is published"):
            move()
    assert int(made.groups[0].ranks[0, 2]) == 2


def test_only_a_filled_slot_is_published() -> None:
    made = slots()
    with pytest.raises(IllegalSlotMoveError, match="slot 0 is empty"):
        made.publish(0)
    made.fill(0, adapter(2))
    made.release(0)
    with pytest.raises(IllegalSlotMoveError, match="slot 0 is empty"):
        made.publish(0)


def test_a_filled_slot_adds_nothing_and_counts_nothing_before_it_is_published() -> None:
    made = slots()
    size = made.fill(1, adapter(3))
    assert (made.is_published(1), made.published_bytes, made.matrices(0, 1)) == (False, 0, None)
    assert not made.groups[0].ranks.any()
    made.publish(1)
    assert (made.is_published(1), made.published_bytes) == (True, size)
    assert made.matrices(0, 1) is not None


def test_a_withdrawn_slot_adds_nothing_and_may_be_withdrawn_again() -> None:
    made = slots()
    load(made, 1, adapter(3))
    for _ in range(2):
        made.withdraw(1)
        assert (made.is_published(1), made.published_bytes, made.matrices(0, 1)) == (False, 0, None)
        assert not made.groups[0].ranks.any()


def test_a_slot_filled_again_shows_the_new_adapter() -> None:
    made, other = slots(), adapter(5)
    load(made, 1, adapter(3))
    assert made.matrices(0, 1) is not None  # a view of the first adapter is cached
    made.withdraw(1)
    load(made, 1, other)
    matrices = made.matrices(0, 1)
    assert matrices is not None
    assert torch.equal(matrices.a, other.a(0))
    assert int(made.groups[0].ranks[0, 1]) == 5


def test_a_request_reaches_a_slot_under_one_identity_until_the_slot_is_withdrawn() -> None:
    made = slots()
    made.fill(0, adapter(2))
    with pytest.raises(WrongWeightsError, match="slot 0 holds no adapter"):
        made.claim(0, "first")
    made.publish(0)
    made.claim(0, "first")
    made.claim(0, "first")
    with pytest.raises(WrongWeightsError, match="slot 0 holds other weights"):
        made.claim(0, "second")
    made.withdraw(0)
    made.publish(0)
    made.claim(0, "second")


@pytest.mark.parametrize("in_host_memory", [False, True])
def test_an_adapter_above_the_slots_rank_is_not_filled_in(in_host_memory: bool) -> None:
    made = slots(max_rank=4, in_host_memory=in_host_memory)
    with pytest.raises(ValueError, match="does not fit"):
        made.fill(0, adapter(5))


# --- where the weights are stored ---


@pytest.mark.parametrize("in_host_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tables_hold_the_position_of_every_matrix(dtype: torch.dtype, in_host_memory: bool) -> None:
    made, weights = slots(dtype, in_host_memory=in_host_memory), adapter(7, dtype)
    load(made, 2, weights)
    linears = [(group, member) for group in made.groups for member in range(len(group.out_features))]
    assert [int(group.ranks[member, 2]) for group, member in linears] == [7, 0, 7]
    for number, (group, member) in enumerate(linears):
        assert not group.ranks[member, :2].any()
        rank, out = int(group.ranks[member, 2]), group.out_features[member]
        for at, size, want in (
            (group.a_at[member, 2], rank * 512, weights.a(number)),
            (group.b_at[member, 2], rank * out, weights.b(number)),
        ):
            address = made.memory.data_ptr() + int(at) * dtype.itemsize
            stored = (ctypes.c_char * (size * dtype.itemsize)).from_address(address).raw
            assert stored == want.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()


def test_slots_on_a_device_do_not_overlap() -> None:
    made, ranks = slots(in_host_memory=False), (64, 60, 64)
    for slot, rank in enumerate(ranks):
        load(made, slot, adapter(rank))
    for slot, rank in enumerate(ranks):
        matrices = made.matrices(0, slot)
        assert matrices is not None
        assert torch.equal(matrices.a, adapter(rank).a(0))


EDGES = (*GROUPS, TargetGroup(("head",), 512, (4096,), ModuleKind.OUTPUT), TargetGroup(("embed",), 4096, (512,), EMBED))


def test_an_adapter_of_a_large_layer_has_memory_of_its_own_on_a_device_while_it_is_in_a_slot() -> None:
    """The regions keep the size for linear layers; no kernel or graph computes what changes an embedding."""
    device = torch.device("cpu")
    made = AdapterSlots(EDGES, slots=3, max_rank=8, dtype=torch.float32, device=device, in_host_memory=False)
    usual = AdapterSlots(GROUPS, slots=3, max_rank=8, dtype=torch.float32, device=device, in_host_memory=False)
    assert made.memory.nbytes == usual.memory.nbytes
    large = RandomAdapter(EDGES, (8, 8, 8, 8, 4), np.random.default_rng(1))
    small = RandomAdapter(EDGES, (8, 0, 8, 0, 0), np.random.default_rng(2))
    assert load(made, 0, large) == usual.memory.nbytes // 3 + large.buffer.nbytes
    assert load(made, 1, small) == usual.memory.nbytes // 3
    for slot, weights, heads in ((0, large, 8), (1, small, 0)):
        assert [int(ranks) for ranks in made.groups[2].ranks[:, slot]] == [heads]
        matrices = made.matrices(0, slot)
        assert matrices is not None
        assert torch.equal(matrices.a[:8], weights.a(0))
    assert (made.runs_by_torch(0), made.runs_by_torch(1), made.any_by_torch) == (True, False, True)
    address = made.memory.data_ptr() + int(made.groups[2].a_at[0, 0]) * 4
    stored = (ctypes.c_float * 4).from_address(address)
    assert list(stored) == large.a(3).flatten()[:4].tolist()
    made.withdraw(0)
    assert (made.runs_by_torch(0), made.any_by_torch) == (False, False)


def test_a_slot_on_a_device_occupies_its_reserved_region_and_gives_nothing_back() -> None:
    made = slots(in_host_memory=False)
    assert load(made, 1, adapter(2)) == made.memory.nbytes // 3
    made.withdraw(1)
    assert made.release(1) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slot_in_host_memory_is_its_adapters_own_buffer(dtype: torch.dtype) -> None:
    made, weights = slots(dtype), adapter(7, dtype)
    load(made, 1, weights)
    matrices = made.matrices(0, 1)
    assert matrices is not None
    assert len(matrices.members) == 1  # the adapter does not target k
    assert matrices.a.data_ptr() == weights.tensor.data_ptr()


def test_a_slot_in_host_memory_gives_back_what_no_other_owner_holds() -> None:
    made = slots()
    alone, elsewhere = adapter(8), adapter(9)
    size = alone.buffer.nbytes
    held = load(made, 0, alone)
    load(made, 1, elsewhere)
    load(made, 2, elsewhere)
    assert size <= held <= size + 2 * mmap.PAGESIZE
    for slot in range(3):
        made.withdraw(slot)
    del alone
    gc.collect()
    assert made.release(0) == held
    assert made.release(0) == 0
    assert made.release(1) == 0  # slot 2 and this test hold it
    del elsewhere
    gc.collect()
    assert made.release(2) > 0
