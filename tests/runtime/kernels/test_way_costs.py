"""Ways are chosen by what was measured; the measuring is short, kept in a file, and done again when that is useless."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorapool_runtime.engines.torch.lora.dispatch import Rows, ScatteredRun, Segment, SlabRun, choose_ways
from lorapool_runtime.engines.torch.lora.slots import GroupSlab
from lorapool_runtime.engines.torch.lora.way_costs import USUAL, WayCosts
from lorapool_runtime.engines.torch.lora.way_probe import known_costs
from lorapool_runtime.weights.layout import lay_out
from lorapool_runtime.weights.targets import TargetGroup

GROUPS = (TargetGroup(("q", "k"), 64, (64, 32)), TargetGroup(("o",), 64, (64,)))
CPU = torch.device("cpu")
LAYOUT = lay_out(GROUPS, (4, 4, 4), 4)


def costs(**changes: tuple[float, ...] | None) -> WayCosts:
    usual = {"segment_us": (10, 20, 40), "run_us": (16, 60, 200), "scatter_us": (4, 10, 40), "kernel_us": (5, 20, 90)}
    return WayCosts(rows=(1, 11, 31), **(usual | changes))  # type: ignore[arg-type]


def test_between_and_beyond_the_measured_rows_costs_follow_the_line() -> None:
    assert [costs().segment(rows) for rows in (1, 6, 11, 21, 31, 41)] == [10, 15, 20, 30, 40, 50]


def test_the_kernel_is_chosen_up_to_where_a_product_is_cheaper() -> None:
    assert [costs().prefers_kernel(rows) for rows in (1, 11, 12, 31)] == [True, True, False, False]
    assert costs().kernel_rows == 11
    assert not costs(kernel_us=None).prefers_kernel(1)


def test_a_run_is_cut_where_its_parts_are_cheapest() -> None:
    pieces = [Rows(slot, slot, slot + 1) for slot in range(4)] + [Rows(4, 4, 40), Rows(5, 40, 41)]
    ways = choose_ways(pieces, [LAYOUT] * 6, costs(), kernel=False)
    assert ways == (SlabRun(0, 4, 1, 0), Segment(Rows(4, 4, 40)), Segment(Rows(5, 40, 41)))


def test_where_a_launch_is_dear_even_slots_far_apart_share_one() -> None:
    pieces = [Rows(0, 0, 1), Rows(2, 1, 2), Rows(3, 2, 3)]
    dear = costs(segment_us=(100, 110, 120), run_us=(101, 140, 400), scatter_us=(1, 1, 1))
    assert choose_ways(pieces, [LAYOUT] * 4, dear, kernel=False) == (ScatteredRun(0, 4, 1, (0, 1, 2), (0, 2, 3)),)
    cheap = costs(segment_us=(1, 2, 3))
    assert all(isinstance(way, Segment) for way in choose_ways(pieces, [LAYOUT] * 4, cheap, kernel=False))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [1, 2]}', USUAL.to_json().replace("41", "NaN")])
def test_only_what_was_written_is_read_back(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # json has its own subclasses of it
        WayCosts.from_json(text)
    assert WayCosts.from_json(USUAL.to_json()) == USUAL


class CountingKernel:
    def __init__(self) -> None:
        self.calls = 0

    def add(self, y: Tensor, x: Tensor, row_slots: Tensor, group: GroupSlab) -> None:
        self.calls += 1


def known(folder: Path | None, kernel: CountingKernel | None, dtype: torch.dtype = torch.float32) -> WayCosts:
    return known_costs(GROUPS, dtype=dtype, device=CPU, max_rank=8, kernel=kernel, folder=folder)


def test_what_was_measured_is_kept_and_logged_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kernel = CountingKernel()
    first = known(tmp_path / "measured", kernel)
    assert kernel.calls > 0
    assert first.kernel_us is not None
    assert [record.message for record in caplog.records if record.message.startswith("LoRA ways")]
    measured = kernel.calls
    assert known(tmp_path / "measured", kernel) == first
    assert kernel.calls == measured
    known(tmp_path / "measured", kernel, torch.bfloat16)  # another type is measured for itself
    assert kernel.calls > measured


def test_a_broken_file_or_folder_costs_the_measuring_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "measured"
    known(folder, None)
    (file,) = folder.iterdir()
    file.write_text("{")
    assert known(folder, None).kernel_us is None
    assert "measuring again" in caplog.text
    assert WayCosts.from_json(file.read_text()).rows
    file_in_the_way = tmp_path / "file"
    file_in_the_way.touch()
    assert math.isfinite(known(file_in_the_way / "folder", None).segment(1))
    assert "cannot be kept" in caplog.text
