"""The GPU kernels for LoRA equal the formula: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton_kit
from lora_kit import RandomAdapter
from torch import Tensor

from lorapool_runtime.engines.interface import BASE_SLOT
from lorapool_runtime.engines.torch.kernels import triton_lora
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows
from lorapool_runtime.engines.torch.lora.kernel_gpu import TritonKernel, row_tiles
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.weights.targets import TargetGroup

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, where NaN is multiplied on purpose

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTH, OUTS, SLOTS, MAX_RANK = 40, (300, 20), 5, 32
GROUPS = (TargetGroup(("q", "k"), WIDTH, OUTS), TargetGroup(("o",), 16, (32,)))
RANKS = ((3, 3, 1), (17, 5, 0), (32, 32, 32), (0, 4, 2), (16, 0, 16))  # per slot, of the three linears
MIXED = [2, -1, 0, 3, 1, 2, 0, -1, 4, 2]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class World:
    """Two groups, an adapter of other ranks in each slot, and the formula."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.slots = AdapterSlots(
            GROUPS, slots=SLOTS, max_rank=MAX_RANK, dtype=dtype, device=DEVICE, in_host_memory=False
        )
        self.slots.memory.fill_(float("nan"))  # memory between and after the adapters is never read
        rng = np.random.default_rng(0)
        self.adapters = [RandomAdapter(GROUPS, ranks, rng, dtype) for ranks in RANKS]
        for slot, adapter in enumerate(self.adapters):
            self.slots.fill(slot, adapter)
            self.slots.publish(slot)
        self.kernel = TritonKernel(self.slots)

    def inputs(self, rows: int, group: int = 0) -> tuple[Tensor, Tensor]:
        torch.manual_seed(rows)
        target = GROUPS[group]
        x = torch.randn(rows, target.in_features) / target.in_features**0.5
        return x.to(DEVICE, self.dtype), torch.randn(rows, sum(target.out_features)).to(DEVICE, self.dtype)

    def by_rows(self, slots: list[int], x: Tensor, y: Tensor, group: int = 0) -> Tensor:
        y = y.clone()
        self.kernel.add(y, x, torch.tensor(slots, dtype=torch.int32, device=DEVICE), self.slots.groups[group])
        return y

    def by_step(self, slots: list[int], x: Tensor, y: Tensor, group: int = 0) -> Tensor:
        y = y.clone()
        add = self.kernel.prepare([SlotRows(slot, i, i + 1) for i, slot in enumerate(slots)])
        add(y, x, self.slots.groups[group])
        return y

    def expected(self, slots: list[int], x: Tensor, y: Tensor, group: int = 0) -> Tensor:
        want, first = y.float().cpu().clone(), sum(g.size for g in GROUPS[:group])
        for i, slot in enumerate(slots):
            if slot >= 0:
                members = range(first, first + GROUPS[group].size)
                want[i] += torch.cat([self.adapters[slot].delta(member, x[i].cpu()) for member in members])
        return want


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got.float().cpu(), want, rtol=limit, atol=limit * float(want.abs().max()))


@pytest.mark.parametrize(
    ("dtype", "group"),
    [(torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 0), (torch.float32, 1), (torch.bfloat16, 1)],
    ids=str,
)
def test_rows_of_any_slots_and_ranks_equal_the_formula(dtype: torch.dtype, group: int) -> None:
    world = World(dtype)
    x, y = world.inputs(len(MIXED), group)
    assert_close(world.by_rows(MIXED, x, y, group), world.expected(MIXED, x, y, group), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tiles_of_many_rows_equal_the_formula(dtype: torch.dtype) -> None:
    slots = [1] * 20 + [-1] * 3 + [2] * 5 + [1] * 21 + [0, 4, -1]  # 41 rows of slot 1: two tiles, not adjacent
    world = World(dtype)
    x, y = world.inputs(len(slots))
    assert_close(world.by_step(slots, x, y), world.expected(slots, x, y), dtype)


def test_an_input_wider_than_one_program_sums_is_added_up_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_lora, "_ROWS_IN", 16)
    monkeypatch.setattr(triton_lora, "_SEGMENTS_IN", 16)
    world, slots = World(), [2] * 9 + MIXED
    x, y = world.inputs(len(slots))
    want = world.expected(slots, x, y)
    assert_close(world.by_rows(slots, x, y), want, torch.float32)
    assert_close(world.by_step(slots, x, y), want, torch.float32)


def test_rows_of_the_base_and_of_empty_slots_stay_bit_for_bit() -> None:
    world = World()
    world.slots.withdraw(1)
    slots = [-1, 1, -1, 3, 1]
    x, y = world.inputs(len(slots))
    x[0], y[2, 7] = float("nan"), float("inf")
    for got in (
        world.by_rows(slots, x, y),
        world.by_step([*slots, *[1] * 9], *(t[[0, 1, 2, 3, 4, *[4] * 9]] for t in (x, y))),
    ):
        assert torch.equal(got[[0, 1, 2, 4]], y[[0, 1, 2, 4]])
        assert torch.equal(got[3, :300], y[3, :300])  # this adapter does not change the first member
        assert not torch.equal(got[3, 300:], y[3, 300:])


@pytest.mark.parametrize("many", [1, 12], ids=["rows", "tiles"])
def test_a_row_or_a_slot_full_of_nan_reaches_no_other_row(many: int) -> None:
    world, slots = World(), [2, 0, -1, 1, 0, 2] * many
    x, y = world.inputs(len(slots))
    clean = world.by_step(slots, x, y)
    sick = x.clone()
    sick[0] = float("nan")
    got = world.by_step(slots, sick, y)
    assert torch.equal(got[1:], clean[1:])
    assert bool(got[0].isnan().all())
    piece = world.adapters[0].layout.linears[0]
    world.slots.memory[piece.a_at : piece.b_at + piece.rank * piece.out_features] = float("nan")
    mine = torch.tensor(slots, device=DEVICE) == 0
    got = world.by_step(slots, x, y)
    assert torch.equal(got[~mine], clean[~mine])
    assert bool(got[mine, :300].isnan().all())


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    world = World()
    x, y = world.inputs(len(MIXED))
    together = world.by_rows(MIXED, x, y)
    for i in (0, 4, 8):
        assert torch.equal(world.by_rows([MIXED[i]], x[i : i + 1], y[i : i + 1])[0], together[i])


def test_the_launch_is_the_same_whatever_the_data_are() -> None:
    world, launched = World(), []
    for slots in (MIXED, [BASE_SLOT] * len(MIXED), [0] * len(MIXED)):
        x, y = world.inputs(len(MIXED))
        with triton_kit.recorded(triton_lora) as launches:
            world.by_rows(slots, x * len(slots), y)
        launched.append(launches.shapes())
        world.slots.withdraw(2) if world.slots.is_published(2) else None  # other ranks for the next round
    assert launched[0] == launched[1] == launched[2]
    assert [launch[0] for launch in launched[0]] == ["_shrink_rows", "_expand_rows"]


def test_row_tiles_hold_each_adapter_row_once_and_always_fit() -> None:
    rng = np.random.default_rng(1)
    for rows in (1, 7, 33, 200):
        row_slots = rng.integers(-1, SLOTS, rows).astype(np.int32)
        order, segments = row_tiles(row_slots, SLOTS)
        assert len(order) == rows
        assert len(segments) == rows // triton_lora.SEGMENT_ROWS + min(SLOTS, rows)
        seen: list[int] = []
        for slot, begin, count in segments.tolist():
            mine = order[begin : begin + count].tolist() if slot >= 0 else []
            assert all(row_slots[row] == slot for row in mine)
            seen += mine
        assert sorted(seen) == np.flatnonzero(row_slots >= 0).tolist()
