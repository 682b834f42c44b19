"""Measures, when the engine starts, what each way to add LoRA costs on the base's own shapes: well under a second.

`core` calls `known_costs` once. What was measured is kept in a file, if a folder is configured, under a key of all
that it depends on: processor, torch, threads, types, shapes, kernel. A file that cannot be read or written costs
the measuring again, nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lorapool_runtime.engines.torch.lora.dispatch import Rows, ScatteredRun, Segment, SlabRun
from lorapool_runtime.engines.torch.lora.layer import PlainRun, RowKernel
from lorapool_runtime.engines.torch.lora.slots import Slabs
from lorapool_runtime.engines.torch.lora.way_costs import RUN_SLOTS, WayCosts
from lorapool_runtime.weights.layout import lay_out
from lorapool_runtime.weights.targets import TargetGroup

log = logging.getLogger(__name__)

_ROWS = (1, 4, 16, 64, 256)
_RANK = 16
_GROUPS = 8  # of the base: two layers of most, more than a core's own cache
_REPEATS = 3
_BUDGET_S = 0.8
"""Past it the numbers of rows that are left are not measured but extended from those before."""


def known_costs(
    groups: Sequence[TargetGroup],
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_rank: int,
    kernel: RowKernel | None,
    folder: Path | None,
) -> WayCosts:
    """Read from `folder` or measured; one line in the log says which, and what follows from it."""
    sample = _sample(groups)
    key = "\n".join((_processor(), torch.__version__, str(torch.get_num_threads()), str(dtype), str(device), *(
        f"{group.in_features}>{group.out_features}" for group in sample
    ), str(min(max_rank, _RANK)), type(kernel).__name__, str(getattr(kernel, "form", ""))))  # fmt: skip
    path = None if folder is None else folder / f"lora-ways-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    began_s, found = time.monotonic(), _read(path)
    costs = found or measure(sample, dtype=dtype, device=device, rank=min(max_rank, _RANK), kernel=kernel)
    if found is None:
        _write(path, costs)
    log.info(
        "LoRA ways: rows %s, us per group: kernel %s, segment %s, run of %d slots %s, scatter %s; kernel up to %d rows",
        costs.rows, _short(costs.kernel_us), _short(costs.segment_us), RUN_SLOTS, _short(costs.run_us),
        _short(costs.scatter_us), costs.kernel_rows,
        extra={"measured_s": round(time.monotonic() - began_s, 2), "from_cache": found is not None},
    )  # fmt: skip
    return costs


def measure(
    groups: Sequence[TargetGroup], *, dtype: torch.dtype, device: torch.device, rank: int, kernel: RowKernel | None
) -> WayCosts:
    """On slabs of its own with random weights."""
    slabs = Slabs(groups, slots=RUN_SLOTS, max_rank=rank, dtype=dtype, device=device)
    slabs.memory.copy_(torch.randn(slabs.memory.numel(), device=device) * 0.01)
    layout = lay_out(tuple(groups), (rank,) * sum(group.size for group in groups), dtype.itemsize)
    for slot in range(RUN_SLOTS):
        slabs.publish(slot, layout)
    stop_s = time.monotonic() + _BUDGET_S
    tables: dict[str, list[float]] = {}
    for rows in _ROWS:
        if time.monotonic() > stop_s:
            break
        for name, seconds in _times(slabs, groups, rows, kernel).items():
            tables.setdefault(name, []).append(seconds * 1e6 / len(groups))
    padded = {name: _padded(times) for name, times in tables.items()}
    return WayCosts(
        rows=_ROWS[: max(len(tables["segment"]), 2)],
        segment_us=padded["segment"],
        run_us=padded.get("run"),
        scatter_us=padded.get("scatter"),
        kernel_us=padded.get("kernel"),
    )


def _times(slabs: Slabs, groups: Sequence[TargetGroup], rows: int, kernel: RowKernel | None) -> dict[str, float]:
    """Seconds for all groups, by each way that is there to choose."""
    device, many = slabs.memory.device, rows * RUN_SLOTS
    x = {g.in_features: torch.randn(many, g.in_features, device=device).to(slabs.dtype) for g in groups}
    y = {g.out_features: torch.zeros(many, sum(g.out_features), device=device, dtype=slabs.dtype) for g in groups}
    segment = _seconds(lambda: _plain(slabs, Segment(Rows(1, 0, rows)), groups, x, y), device)
    if kernel is None:
        whole = tuple(range(many))
        run = _seconds(lambda: _plain(slabs, SlabRun(0, RUN_SLOTS, rows, 0), groups, x, y), device)
        scattered = _seconds(
            lambda: _plain(slabs, ScatteredRun(0, RUN_SLOTS, rows, whole, whole), groups, x, y), device
        )
        return {"segment": segment, "run": run, "scatter": max(0.0, scattered - run)}
    slots = torch.ones(rows, dtype=torch.int32, device=device)

    def add() -> None:
        for number, group in enumerate(groups):
            kernel.add(y[group.out_features][:rows], x[group.in_features][:rows], slots, slabs.groups[number])

    return {"segment": segment, "kernel": _seconds(add, device)}


def _plain(
    slabs: Slabs,
    way: Segment | SlabRun | ScatteredRun,
    groups: Sequence[TargetGroup],
    x: dict[int, Tensor],
    y: dict[tuple[int, ...], Tensor],
) -> None:
    run = PlainRun(way, slabs)
    for number, group in enumerate(groups):
        run.add(number, x[group.in_features], y[group.out_features])


def _seconds(act: Callable[[], None], device: torch.device) -> float:
    """The least of a few: what others take of the machine is no cost of the way."""
    least = float("inf")
    act()
    for _ in range(_REPEATS):
        _settle(device)
        began_s = time.perf_counter()
        act()
        _settle(device)
        least = min(least, time.perf_counter() - began_s)
    return least


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample(groups: Sequence[TargetGroup]) -> tuple[TargetGroup, ...]:
    """The first few of the base's groups, and the first of every other shape."""
    shapes, sample = set(), []
    for number, group in enumerate(groups):
        shape = (group.in_features, group.out_features)
        if number < _GROUPS or shape not in shapes:
            sample.append(group)
        shapes.add(shape)
    return tuple(sample)


def _padded(times: list[float]) -> tuple[float, ...]:
    return tuple(times) if len(times) > 1 else (times[0], times[0] * _ROWS[1])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(path: Path | None) -> WayCosts | None:
    if path is None or not path.is_file():
        return None
    try:
        return WayCosts.from_json(path.read_text())
    except (OSError, ValueError) as error:
        log.warning("measured ways in %s cannot be read, measuring again: %s", path, error)
        return None


def _write(path: Path | None, costs: WayCosts) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(costs.to_json())
        partial.replace(path)
    except OSError as error:
        log.warning("measured ways cannot be kept in %s: %s", path, error)


def _short(times: tuple[float, ...] | None) -> str:
    return "none" if times is None else "/".join(f"{t:.0f}" for t in times)
