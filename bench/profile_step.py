"""Where each millisecond of a steady decode step goes: W1's 16 rows, on the base alone and over 16 distinct adapters.

    python bench/profile_step.py BASE_FOLDER [--dtypes float32 bfloat16] [--threads 2] [--rounds 3] [--json PATH]

The engine's core runs in this thread without its queue. Rounds alternate between the unmodified step and the step with
a timer around each part; a part's time excludes the parts nested in it. Where the step is one native call, that call
times its own kernels. The exit code is 1 when the parts' sum differs from the unmodified step by more than 10 %. The
floor is the base's packed linears alone. `--python` measures the model's own code instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common.places import commit
from common.records import machine
from safetensors.torch import save_file

from lorapool_runtime.cgroup import usable_cores
from lorapool_runtime.engines.interface import BASE_SLOT, GenerationRequest, SamplingParams
from lorapool_runtime.engines.torch import core as core_module
from lorapool_runtime.engines.torch import runner as runner_module
from lorapool_runtime.engines.torch.config import EngineConfig
from lorapool_runtime.engines.torch.core import Core
from lorapool_runtime.engines.torch.decode_program.step_program import StepProgram
from lorapool_runtime.engines.torch.kernels.base_step import RowGate
from lorapool_runtime.engines.torch.kernels.fused_linear import FusedLinear
from lorapool_runtime.engines.torch.lora.layer import LoraBatch, LoraGroup
from lorapool_runtime.engines.torch.model.attention import PagedAttention
from lorapool_runtime.engines.torch.model.kv_pool import KVPool
from lorapool_runtime.engines.torch.model.load import Base
from lorapool_runtime.engines.torch.runner import Runner
from lorapool_runtime.engines.torch.scheduling.scheduler import Scheduler

NATIVE = {
    "norm": "norms", "linear": "linears", "lora": "lora", "rotary": "rotary",
    "attention": "attention: scores and values",
    "activation": "activation", "residual": "residuals",
}  # fmt: skip
"""The parts by the decode program's names; the output layer is one of its linears."""
REQUESTS, PROMPT, NEW, RANK = 16, 32, 32, 16
TOLERANCE = 0.10


class Clock:
    """Time per part, excluding the parts nested in it."""

    def __init__(self) -> None:
        self.own_s: dict[str, float] = defaultdict(float)
        self._inner_s = [0.0]

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        own_s, inner_s, now = self.own_s, self._inner_s, time.perf_counter

        def timed(*args: Any, **kwargs: Any) -> Any:
            inner_s.append(0.0)
            begin = now()
            try:
                return function(*args, **kwargs)
            finally:
                took = now() - begin
                own_s[part] += took - inner_s.pop()
                inner_s[-1] += took

        return timed


@contextmanager
def clocked(core: Core, clock: Clock) -> Iterator[None]:
    """Wraps every part of the engine with a timer, and removes the timers at the end."""
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, part: str) -> None:
        if hasattr(owner, name):
            kept = vars(owner).get(name)
            setattr(owner, name, clock.wrap(part, getattr(owner, name)))
            undo.append(lambda: delattr(owner, name) if kept is None else setattr(owner, name, kept))

    put(Scheduler, "schedule", "scheduler")
    put(core_module, "sample", "sampling")
    put(Runner, "run", "tensors of the step")
    put(runner_module, "PagedAttention", "tensors of the step")
    put(StepProgram, "run", "tensors of the step")
    put(StepProgram, "can_run", "tensors of the step")
    put(Base, "logits", "model: glue and residuals")
    put(FusedLinear, "__call__", "linears")
    put(LoraGroup, "output", "linears: glue")
    put(LoraGroup, "all_outputs", "linears: glue")
    put(RowGate, "__call__", "activation")
    put(LoraBatch, "add", "lora")
    put(PagedAttention, "attend", "attention: scores and values")
    put(KVPool, "write", "attention: write")
    put(KVPool, "gather", "attention: gather")
    rotaries = set()
    for name, module in core.base.model.named_modules():
        leaf, kind = name.rpartition(".")[2], type(module)
        if "norm" in leaf:
            put(module, "forward", "norms")
        elif "rotary" in leaf:
            put(module, "forward", "rotary")
        elif isinstance(module, torch.nn.Embedding):
            put(module, "forward", "embedding")
        elif leaf.startswith("act"):
            put(module, "forward", "activation")
        elif leaf == "mlp":
            put(module, "forward", "mlp: product and glue")
        elif hasattr(sys.modules[kind.__module__], "apply_rotary_pos_emb"):
            rotaries.add(sys.modules[kind.__module__])
    for modeling in rotaries:
        put(modeling, "apply_rotary_pos_emb", "rotary")
    try:
        yield
    finally:
        for back in reversed(undo):
            back()


@dataclass(frozen=True, slots=True)
class Profile:
    dtype: str
    rows: str
    whole_ms: float
    """The unmodified step: median over steps, then over rounds."""
    whole_runs_ms: tuple[float, ...]
    parts_ms: dict[str, float]
    floor_ms: float
    """The packed linears and the output layer alone."""

    @property
    def sum_over_whole(self) -> float:
        return sum(self.parts_ms.values()) / self.whole_ms


def write_adapters(core: Core, folder: Path, ranks: Sequence[int] = (RANK,) * REQUESTS) -> list[Path]:
    """Writes a random adapter of each rank in peft's file format, on every target layer of the base."""
    folders = []
    names = sorted({target.module.rpartition(".")[2] for target in core.facts.targets})
    for number, rank in enumerate(ranks):
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "task_type": "CAUSAL_LM"}
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for target in core.facts.targets:
            a = torch.randn((rank, target.in_features), generator=generator) / target.in_features**0.5
            b = torch.randn((target.out_features, rank), generator=generator) * 0.3 / rank**0.5
            tensors[f"base_model.model.{target.module}.lora_A.weight"] = a
            tensors[f"base_model.model.{target.module}.lora_B.weight"] = b
        own = folder / f"adapter-{number}"
        own.mkdir()
        save_file(tensors, own / "adapter_model.safetensors")
        (own / "adapter_config.json").write_text(json.dumps(config))
        folders.append(own)
    return folders


def decode_steps_s(core: Core, slots: list[int]) -> list[float]:
    """Runs W1 once and returns the seconds of every step in which all rows decode, without the first and last few."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, core.facts.vocab_size - 5, (REQUESTS, PROMPT), generator=generator).tolist()
    greedy = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    for number, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        core.add(GenerationRequest(str(number), tuple(prompt), slot, f"salt-{slot}", greedy))
    took = []
    while core.scheduler.has_work:
        begin = time.perf_counter()
        core.step()
        took.append(time.perf_counter() - begin)
    steady = took[-NEW + 4 : -2]
    assert len(steady) == NEW - 6
    return steady


def floor_ms(core: Core, rounds: int) -> float:
    """Every packed product of a step, including the output layer, in a loop over 16 rows."""
    layers = [group.base for group in core.base.lora.groups]
    inputs = {layer.in_features: torch.randn(REQUESTS, layer.in_features).to(core.base.dtype) for layer in layers}

    def loop() -> float:
        begin = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        return (time.perf_counter() - begin) * 1e3

    loop()
    return statistics.median(loop() for _ in range(10 * rounds))


def profile(core: Core, dtype: str, rows: str, slots: list[int], rounds: int) -> Profile:
    decode_steps_s(core, slots)
    whole, clock, steps = [], Clock(), 0
    for _ in range(rounds):
        whole.append(statistics.median(decode_steps_s(core, slots)) * 1e3)
        with clocked(core, clock):
            before = dict(clock.own_s)
            counted = _steady_parts(core, slots, clock)
            clock.own_s.clear()
            clock.own_s.update({part: before.get(part, 0.0) + own for part, own in counted[0].items()})
            steps += counted[1]
    parts = {part: own * 1e3 / steps for part, own in sorted(clock.own_s.items(), key=lambda item: -item[1])}
    return Profile(dtype, rows, statistics.median(whole), tuple(whole), parts, floor_ms(core, rounds))


def _steady_parts(core: Core, slots: list[int], clock: Clock) -> tuple[dict[str, float], int]:
    """Each part's own seconds summed over the steady steps, and the number of those steps."""
    step, seen, marks = core.step, 0, []

    program = core.runner.decode_path
    native = program if isinstance(program, StepProgram) else None

    def marked() -> Any:
        nonlocal seen
        clock.own_s.clear()
        if native is not None:
            native.spent_ms()
        result = clock.wrap("sequences and outputs", step)()
        for kind, spent_ms in (native.spent_ms() if native is not None else {}).items():
            clock.own_s[NATIVE[kind]] += spent_ms / 1e3
            clock.own_s["tensors of the step"] -= spent_ms / 1e3
        marks.append(dict(clock.own_s))
        seen += 1
        return result

    core.step = marked  # type: ignore[method-assign]  # for this one run
    try:
        decode_steps_s(core, slots)
    finally:
        if native is not None:
            native.stop_clock()
        del core.step  # type: ignore[method-assign]  # the class's own again
    steady = marks[-NEW + 4 : -2]
    total: dict[str, float] = defaultdict(float)
    for mark in steady:
        for part, own in mark.items():
            total[part] += own
    return total, len(steady)


def table(profiles: list[Profile]) -> str:
    parts = list(dict.fromkeys(part for profile in profiles for part in profile.parts_ms))
    head = [f"{p.dtype.replace('float', 'f')} {p.rows}" for p in profiles]
    lines = [f"{'ms per step':30}" + "".join(f"{h:>18}" for h in head)]
    lines += [f"{part:30}" + "".join(f"{p.parts_ms.get(part, 0.0):18.2f}" for p in profiles) for part in parts]
    for name, cells in (
        ("sum of parts", [f"{sum(p.parts_ms.values()):.2f}" for p in profiles]),
        ("whole, untouched", [f"{p.whole_ms:.2f}" for p in profiles]),
        ("sum / whole", [f"{p.sum_over_whole:.3f}" for p in profiles]),
        ("linears alone (floor)", [f"{p.floor_ms:.2f}" for p in profiles]),
        ("floor / whole", [f"{p.floor_ms / p.whole_ms:.2f}" for p in profiles]),
        ("tokens per second", [f"{REQUESTS / p.whole_ms * 1e3:.0f}" for p in profiles]),
    ):
        lines.append(f"{name:30}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def write_profiles(path: Path, profiles: list[Profile]) -> None:
    body = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "load_average": round(os.getloadavg()[0], 1),
        "profiles": [asdict(p) for p in profiles],
    }
    path.write_text(json.dumps(body, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=["base", "distinct16"], choices=["base", "distinct16"])
    parser.add_argument("--python", action="store_true", help="the model's own code, not the native call")
    parser.add_argument("--json", type=Path, help="where to write the profiles")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    profiles = []
    for dtype in arguments.dtypes:
        with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
            core = Core(
                EngineConfig(
                    arguments.base, dtype=dtype, slots=REQUESTS, max_batch=REQUESTS, max_model_len=512, device="cpu"
                )
            )
            if arguments.python:
                core.runner.decode_path = None
            if "distinct16" in arguments.rows:
                for slot, folder in enumerate(write_adapters(core, Path(scratch))):
                    core.load(slot, core.reader.read(folder, max_rank=64))
            for rows in arguments.rows:
                slots = [BASE_SLOT] * REQUESTS if rows == "base" else list(range(REQUESTS))
                profiles.append(profile(core, dtype, rows, slots, arguments.rounds))
            del core
    print(f"{arguments.threads} threads, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(table(profiles))
    if arguments.json:
        write_profiles(arguments.json, profiles)
    off = [p for p in profiles if abs(p.sum_over_whole - 1) > TOLERANCE]
    for p in off:
        print(f"{p.dtype} {p.rows}: the parts add up to {p.sum_over_whole:.2f} of the whole", file=sys.stderr)
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
