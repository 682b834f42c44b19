"""LoRA by torch gives the numbers of the formula, and a row meets the weights of its own slot only."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lora_kit import RandomAdapter
from torch import Tensor, nn

from lorapool_runtime.engines.torch.kernels.fused_linear import FusedLinear
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows, adapter_segments, slot_of_each_row
from lorapool_runtime.engines.torch.lora.layer import LoraBatch, LoraGroup, LoraLinear
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.weights.layout import lay_out
from lorapool_runtime.weights.targets import TargetGroup

WIDTH, OUTS, SLOTS, MAX_RANK = 24, (20, 12), 6, 8
RANKS = ((4, 4), (4, 4), (4, 4), (1, 8), (0, 3), (7, 2))  # per slot, of the two linears
CPU = torch.device("cpu")


class World:
    """A group of two linears with an adapter of another rank in each slot, and the formula to compare with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.linears = [nn.Linear(WIDTH, out).to(dtype).requires_grad_(False) for out in OUTS]
        group = TargetGroup(("a.q", "a.k"), WIDTH, OUTS)
        self.batch = LoraBatch()
        self.slots = AdapterSlots(
            (group,), slots=SLOTS, max_rank=MAX_RANK, dtype=dtype, device=CPU, in_host_memory=True
        )
        self.batch.slots = self.slots
        rng = np.random.default_rng(0)
        self.weights = {}
        for slot, ranks in enumerate(RANKS):
            self.weights[slot] = RandomAdapter((group,), ranks, rng)
            self.slots.fill(slot, self.weights[slot])
            self.slots.publish(slot)
        lora = LoraGroup(0, group, FusedLinear(self.linears), self.batch)
        self.modules = [LoraLinear(lora, member) for member in range(2)]

    def run(self, slots: list[int], x: Tensor) -> list[Tensor]:
        self.batch.set([SlotRows(slot, i, i + 1) for i, slot in enumerate(slots)])
        return [module(x[None])[0] for module in self.modules]

    def expected(self, slots: list[int], x: Tensor) -> list[Tensor]:
        outs = [linear(x) for linear in self.linears]
        for i, slot in enumerate(slots):
            if slot >= 0:
                for member in range(2):
                    outs[member][i] += self.weights[slot].delta(member, x[i])
        return outs


CASES = {
    "base only": [-1, -1, -1],
    "one adapter": [2, 2, 2, 2],
    "one adapter and base": [-1, -1, 4, 4],
    "all distinct": [0, 1, 2, 3, 4, 5],
    "equal counts": [1, 1, 2, 2, 3, 3],
    "unequal counts": [-1, 0, 1, 1, 1, 2, 5, 5],
    "far apart": [0, 5],
    "many of one, one of another": [0] * 30 + [1],
    "decode rows, then prefill": [-1, 0, 1, 4, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3],
}


@pytest.mark.parametrize("slots", CASES.values(), ids=CASES.keys())
def test_a_mixed_batch_equals_the_formula_row_by_row(slots: list[int]) -> None:
    world = World()
    x = torch.randn(len(slots), WIDTH)
    for got, wanted in zip(world.run(slots, x), world.expected(slots, x), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_what_is_not_finite_in_one_row_reaches_no_other() -> None:
    world = World()
    slots = [-1, -1, 0, 1, 1, 2, 4, 5]
    x = torch.randn(len(slots), WIDTH)
    clean = world.run(slots, x)
    for sick in (0, 2, 4):
        poisoned = x.clone()
        poisoned[sick] = float("nan")
        others = [i for i in range(len(slots)) if i != sick]
        for got, wanted in zip(world.run(slots, poisoned), clean, strict=True):
            assert torch.equal(got[others], wanted[others])
            assert bool(got[sick].isnan().all())


def test_a_slot_full_of_nan_reaches_its_own_rows_only() -> None:
    world = World()
    slots = [-1, 0, 2, 2, 4, 5]  # scattered over slots 0..5, slot 1 and 3 between
    x = torch.randn(len(slots), WIDTH)
    clean = world.run(slots, x)
    for sick in (1, 2, 3):
        matrices = world.slots.matrices(0, sick)
        assert matrices is not None
        matrices.a.fill_(float("nan"))
    for got, wanted in zip(world.run(slots, x), clean, strict=True):
        assert torch.equal(got[[0, 1, 4, 5]], wanted[[0, 1, 4, 5]])
        assert bool(got[[2, 3]].isnan().all())


def test_an_unloaded_slot_adds_nothing() -> None:
    world = World()
    x = torch.randn(3, WIDTH)
    world.slots.withdraw(1)
    del world.weights[1]
    got = world.run([0, 1, 2], x)
    assert torch.allclose(got[0][1], world.linears[0](x)[1], atol=1e-5)


def test_members_may_be_asked_in_any_order_and_twice() -> None:
    world = World()
    x = torch.randn(2, WIDTH)
    wanted = world.expected([0, 1], x)
    world.run([0, 1], x)
    q, k = world.modules
    x3 = x[None]
    for module, want in ((k, wanted[1]), (q, wanted[0]), (q, wanted[0]), (k, wanted[1])):
        torch.testing.assert_close(module(x3)[0], want, rtol=1e-5, atol=1e-4)


def test_bias_and_no_bias_may_share_a_group() -> None:
    linears = [nn.Linear(4, 3), nn.Linear(4, 2, bias=False)]
    x = torch.randn(5, 4)
    with torch.no_grad():
        torch.testing.assert_close(FusedLinear(linears)(x), torch.cat([linear(x) for linear in linears], 1))


def test_fusing_leaves_the_original_weights_alone() -> None:
    linear = nn.Linear(16, 16)
    before = linear.weight.detach().clone()
    FusedLinear([linear])
    assert torch.equal(linear.weight, before)


def test_adjacent_rows_of_one_slot_are_one_segment_and_rows_of_the_base_are_none() -> None:
    batch = [SlotRows(-1, 0, 4), SlotRows(2, 4, 5), SlotRows(2, 5, 90), SlotRows(-1, 90, 91), SlotRows(2, 91, 92)]
    assert adapter_segments(batch) == (SlotRows(2, 4, 90), SlotRows(2, 91, 92))
    assert adapter_segments(batch[:1]) == ()


@pytest.mark.parametrize("seed", range(20))
def test_segments_and_row_slots_cover_each_adapter_row_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    slots = [rng.randrange(-1, 4) for _ in range(rng.randrange(1, 40))]
    batch = [SlotRows(slot, i, i + 1) for i, slot in enumerate(slots)]
    assert slot_of_each_row(batch) == slots
    covered = [(row, one.slot) for one in adapter_segments(batch) for row in range(one.begin, one.end)]
    assert covered == [(row, slot) for row, slot in enumerate(slots) if slot >= 0]


def test_equal_layouts_are_one_object() -> None:
    groups = (TargetGroup(("a",), 4, (4,)),)
    assert lay_out(groups, (2,), 4) is lay_out((TargetGroup(("a",), 4, (4,)),), (2,), 4)
