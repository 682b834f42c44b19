"""How much memory training needs, and whether one more job fits. Only the probe reads /proc or asks CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

BYTES_PER_PARAMETER = 16
"""A LoRA parameter, its gradient and AdamW's two moments, in float32."""
USABLE = 0.9
"""The part of the limit that jobs may fill."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """In bytes."""

    base: int
    fixed: int
    """The process and its libraries, as measured when the base had been loaded."""
    adapters: int
    """Of the present jobs: weights, gradients, moments."""
    activations: int
    """Measured in a step with as many tokens as the token budget."""


@dataclass(frozen=True, slots=True)
class Admission:
    fits: bool
    needed: int
    limit: int
    message: str


def admission(figures: MemoryFigures, parameters: int, limit_bytes: int) -> Admission:
    """Whether a job with so many LoRA parameters fits in addition to the present ones."""
    new = parameters * BYTES_PER_PARAMETER
    needed = figures.base + figures.fixed + figures.adapters + figures.activations + new
    limit = int(limit_bytes * USABLE)
    message = (
        f"training needs {_gib(needed)}: base {_gib(figures.base)}, process {_gib(figures.fixed)}, present jobs "
        f"{_gib(figures.adapters)}, activations {_gib(figures.activations)}, this job {_gib(new)}; {USABLE:.0%} of the "
        f"memory limit is {_gib(limit)}"
    )
    return Admission(needed <= limit, needed, limit, message)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"


def used_bytes(device: torch.device) -> int:
    """Memory in use on the device, or by this process where the device is the CPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free)
    return _status_kib("VmRSS") * 1024


def peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    """How far memory rises above what is used now while `run` runs, at least 0."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = int(torch.cuda.memory_allocated(device))
        run()
        return max(0, int(torch.cuda.max_memory_allocated(device)) - allocated)
    before = used_bytes(device)
    Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM begin at the present size
    run()
    return max(0, _status_kib("VmHWM") * 1024 - before)


def _status_kib(name: str) -> int:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == f"{name}:")
