"""The native row kernel equals the formula and does not depend on the rest of the batch."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_kit import RandomAdapter
from torch import Tensor

from lorapool_runtime import native_library
from lorapool_runtime.engines.torch.lora import kernel_cpu
from lorapool_runtime.engines.torch.lora.dispatch import SlotRows
from lorapool_runtime.engines.torch.lora.kernel_cpu import NativeRowKernel, add_lora_rows, load_row_kernel
from lorapool_runtime.engines.torch.lora.layer import LoraBatch
from lorapool_runtime.engines.torch.lora.slots import AdapterSlots
from lorapool_runtime.native_library import NativeSettingError, open_library
from lorapool_runtime.weights.targets import TargetGroup

CPU = torch.device("cpu")
GROUPS = (TargetGroup(("a.q", "a.k", "a.v"), 72, (72, 40, 5)), TargetGroup(("a.o",), 19, (600,)))
SLOTS, MAX_RANK = 7, 64
RANKS = ((4, 4, 4, 4), (8, 0, 3, 1), (64, 64, 64, 64), (0, 0, 0, 9), (1, 2, 3, 0), (16, 16, 16, 16))  # slot 6: empty


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built library if it is as new as its sources, else one that is built here."""
    root = Path(__file__).parents[3] / "runtime"
    sources = [*(root / "native").iterdir(), root / "native_build.py"]
    built = native_library.FOLDER / "liblora_rows.so"
    if built.is_file() and built.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
        return built
    if shutil.which("g++") is None:
        pytest.skip("there is no compiler, and the library is not built")
    spec = importlib.util.spec_from_file_location("native_build", root / "native_build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    made: Path = build.compile_library(tmp_path_factory.mktemp("native") / built.name)
    return made


@pytest.fixture(scope="session", params=["baseline", "avx2", "avx512"])
def kernel(library: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> NativeRowKernel:
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copyfile(library, folder / library.name)  # under a path of its own it is loaded once more
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPOOL_NATIVE", request.param)
        try:
            kernel = NativeRowKernel(open_library(kernel_cpu.NAME, kernel_cpu.VERSION, folder))
        except NativeSettingError as error:
            pytest.skip(str(error))
    assert kernel.isa == request.param
    return kernel


class World:
    def __init__(self, dtype: torch.dtype = torch.float32, *, in_host_memory: bool = True) -> None:
        rng = np.random.default_rng(0)
        self.slots = AdapterSlots(
            GROUPS, slots=SLOTS, max_rank=MAX_RANK, dtype=dtype, device=CPU, in_host_memory=in_host_memory
        )
        self.adapters = [RandomAdapter(GROUPS, ranks, rng, dtype) for ranks in RANKS]
        for slot, adapter in enumerate(self.adapters):
            self.slots.fill(slot, adapter)
            self.slots.publish(slot)

    def expected(self, group: int, x: Tensor, y: Tensor, slots: list[int]) -> Tensor:
        out, first = y.float().clone(), self.slots.first_linears[group]
        for row, slot in enumerate(slots):
            if 0 <= slot < len(RANKS):
                members = range(first, first + GROUPS[group].size)
                out[row] += torch.cat([self.adapters[slot].delta(linear, x[row]) for linear in members])
        return out


def batch(group: int, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    width, outs = GROUPS[group].in_features, sum(GROUPS[group].out_features)
    x, y = (torch.randn(rows, size, generator=generator).to(dtype) for size in (width, outs))
    return x, y


def run(kernel: NativeRowKernel, world: World, group: int, x: Tensor, y: Tensor, slots: list[int]) -> Tensor:
    out = y.clone()
    kernel.add(out, x, torch.tensor(slots, dtype=torch.int32), world.slots.groups[group])
    return out


ROWS = st.lists(st.integers(-1, SLOTS - 1), min_size=1, max_size=24)


@pytest.mark.parametrize("in_host_memory", [False, True])
@pytest.mark.parametrize("group", [0, 1])
@settings(max_examples=40, deadline=None)
@given(slots=ROWS)
def test_rows_in_any_order_and_of_any_rank_equal_the_formula(
    kernel: NativeRowKernel, group: int, in_host_memory: bool, slots: list[int]
) -> None:
    world = World(in_host_memory=in_host_memory)
    x, y = batch(group, len(slots))
    got = run(kernel, world, group, x, y, slots)
    torch.testing.assert_close(got, world.expected(group, x, y, slots), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("group", [0, 1])
@settings(max_examples=20, deadline=None)
@given(slots=ROWS)
def test_bfloat16_is_summed_in_float32_and_rounded_once(kernel: NativeRowKernel, group: int, slots: list[int]) -> None:
    world = World(torch.bfloat16)
    x, y = batch(group, len(slots), torch.bfloat16)
    got = run(kernel, world, group, x, y, slots).float()
    torch.testing.assert_close(got, world.expected(group, x, y, slots), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [8, 9, 11, 33])
def test_a_prompts_rows_are_bit_for_bit_as_one_by_one(kernel: NativeRowKernel, dtype: torch.dtype, rows: int) -> None:
    """They are computed together, in blocks; other rows of the step are not."""
    world = World(dtype)
    slots = [-1, 0, *[5] * rows, 2, *[1] * rows, 3]
    for group in (0, 1):
        x, y = batch(group, len(slots), dtype)
        whole = run(kernel, world, group, x, y, slots)
        tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype is torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(whole.float(), world.expected(group, x, y, slots), **tolerance)
        for row, slot in enumerate(slots):
            one = slice(row, row + 1)
            assert torch.equal(run(kernel, world, group, x[one], y[one], [slot]), whole[one])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_of_the_batch_changes_no_bit_of_a_row(kernel: NativeRowKernel, dtype: torch.dtype) -> None:
    world = World(dtype)
    slots = [5, -1, 0, 2, 2, 0, 6, 3, 4, 1, 1, 5, 5, 5, 5, 2]
    for group in (0, 1):
        x, y = batch(group, len(slots), dtype)
        whole = run(kernel, world, group, x, y, slots)
        for row, slot in enumerate(slots):
            one = slice(row, row + 1)
            assert torch.equal(run(kernel, world, group, x[one], y[one], [slot]), whole[one])
        order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(1))
        mixed = run(kernel, world, group, x[order], y[order], [slots[i] for i in order])
        assert torch.equal(mixed, whole[order])


def test_the_number_of_threads_changes_no_bit(kernel: NativeRowKernel) -> None:
    world, slots, before = World(), [2, 2, 2, 0, 5, 1], torch.get_num_threads()
    x, y = batch(1, len(slots))
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(kernel, world, 1, x, y, slots))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_base_and_of_empty_slots_keep_their_bits_even_nan(
    kernel: NativeRowKernel, dtype: torch.dtype
) -> None:
    world = World(dtype)
    x, y = batch(0, 4, dtype)
    x[0] = y[1] = float("nan")
    got = run(kernel, world, 0, x, y, [-1, 6, 0, 3])  # slot 3 has nothing for group 0
    kept = [0, 1, 3]
    assert torch.equal(got[kept].view(torch.uint8), y[kept].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(kernel: NativeRowKernel, dtype: torch.dtype) -> None:
    world, slots = World(dtype), [0, 2, 2, 5, -1, 2, 0]
    x, y = batch(0, len(slots), dtype)
    clean = run(kernel, world, 0, x, y, slots)
    sick = x.clone()
    sick[1] = float("nan")
    got, others = run(kernel, world, 0, sick, y, slots), [0, 2, 3, 4, 5, 6]
    assert torch.equal(got[others], clean[others])
    assert bool(got[1].isnan().all())
    matrices = world.slots.matrices(0, 2)
    assert matrices is not None
    matrices.a.fill_(float("inf"))
    got, others = run(kernel, world, 0, x, y, slots), [0, 3, 4, 6]
    assert torch.equal(got[others], clean[others])
    assert not got[[1, 2, 5]].isfinite().any()


def test_a_slot_that_does_not_exist_is_refused_before_anything_is_added(kernel: NativeRowKernel) -> None:
    world = World()
    x, y = batch(0, 3)
    out = y.clone()
    with pytest.raises(ValueError, match="does not exist"):
        kernel.add(out, x, torch.tensor([0, 1, SLOTS], dtype=torch.int32), world.slots.groups[0])
    assert torch.equal(out, y)


def test_tensors_of_another_shape_type_or_order_are_refused(kernel: NativeRowKernel) -> None:
    world = World()
    x, y = batch(0, 3)
    slots, group = torch.zeros(3, dtype=torch.int32), world.slots.groups[0]
    for bad in (
        (y[:2], x, slots),
        (y, x.double(), slots),
        (y, x, slots.long()),
        (y, x.T.contiguous().T, slots),
    ):
        with pytest.raises(ValueError, match=r"fit|contiguous|adapters"):
            kernel.add(*bad, group)


def test_a_step_with_the_kernel_equals_one_by_torch(kernel: NativeRowKernel) -> None:
    world = World()
    rows = [
        SlotRows(-1, 0, 2),
        SlotRows(0, 2, 3),
        SlotRows(5, 3, 7),
        SlotRows(1, 7, 8),
        SlotRows(2, 8, 90),
    ]  # the last is a prefill
    found = []
    for one in (kernel, None):
        lora = LoraBatch()
        lora.slots, lora.kernel = world.slots, one
        lora.set(rows)
        x, y = batch(0, 90)
        lora.add(0, x, y)
        found.append(y)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


def test_the_traced_operator_is_the_kernel(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cpu, "open_library", lambda name, version: ctypes.CDLL(str(library)))
    world = World(in_host_memory=False)  # opcheck copies the memory that positions are counted from
    x, y = batch(0, 4)
    slots, group = torch.tensor([0, 5, -1, 2], dtype=torch.int32), world.slots.groups[0]
    direct, traced = y.clone(), y.clone()
    NativeRowKernel(ctypes.CDLL(str(library))).add(direct, x, slots, group)
    arguments = (traced, x, slots, group.memory, group.ranks, group.a_at, group.b_at, list(group.out_features))
    add_lora_rows(*arguments)
    assert torch.equal(direct, traced)
    torch.library.opcheck(add_lora_rows, arguments, test_utils=("test_schema", "test_faketensor"))


def test_without_a_usable_library_the_log_gives_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPOOL_NATIVE", "auto")
    caplog.set_level(logging.INFO)
    assert load_row_kernel(torch.float32, CPU, tmp_path) is None
    assert "was not built" in caplog.text
    (tmp_path / "liblora_rows.so").write_bytes(b"no library")
    caplog.clear()
    assert load_row_kernel(torch.float32, CPU, tmp_path) is None
    assert "torch multiplies instead" in caplog.text
    assert load_row_kernel(torch.float16, CPU, tmp_path) is None
    assert "float16" in caplog.text


def test_the_library_shares_torchs_openmp(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPOOL_NATIVE", "auto")
    assert load_row_kernel(torch.float32, CPU, library.parent) is not None
    assert len(native_library._openmp_runtimes()) == 1
